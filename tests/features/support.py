"""Random activations, and every statistic of them in plain Python."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from nnsight_transcoders.features.entries import SparseActivations
from nnsight_transcoders.features.statistics import FeatureStatistics, StatisticsConfig
from nnsight_transcoders.features.tables import mixed

SMALL = StatisticsConfig(
    n_top=3, n_bands=4, per_band=2, n_bins=8, before=2, after=1, sketch=4, n_reference=5
)
N_FEATURES = 9


def random_contexts(n: int = 40, seed: int = 0) -> list[torch.Tensor]:
    """Dense activations ``(T, F)`` of contexts of different lengths; feature 8 is never active.

    Later contexts have larger activations, so that ranges grow on the way; some values are equal.
    """
    draw = torch.Generator().manual_seed(seed)
    contexts = []
    for i in range(n):
        length = int(torch.randint(1, 9, (), generator=draw))
        value = (torch.rand(length, N_FEATURES, generator=draw) * 16).ceil() / 8 * (1 + i / 4)
        rate = torch.linspace(0.05, 0.9, N_FEATURES)
        value *= torch.rand(length, N_FEATURES, generator=draw) < rate
        value[:, -1] = 0
        contexts.append(value)
    return contexts


def ids_of(dense: torch.Tensor) -> torch.Tensor:
    """Token ids of a context: four of them, so that windows repeat."""
    return (dense[:, 0] > 0).long() + 2 * (dense[:, 1] > 0).long()


def as_batch(contexts: list[torch.Tensor]) -> tuple[list[torch.Tensor], SparseActivations]:
    """Token ids and active entries of some contexts."""
    rows = [
        (context, position, feature, float(dense[position, feature]))
        for context, dense in enumerate(contexts)
        for position, feature in dense.nonzero().tolist()
    ]
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)] if rows else []
    if not columns:
        columns = [torch.zeros(0, dtype=torch.int64)] * 3 + [torch.zeros(0)]
    return [ids_of(context) for context in contexts], SparseActivations(*columns)


def collected(
    contexts: list[torch.Tensor], batch: int, config: StatisticsConfig = SMALL
) -> FeatureStatistics:
    """The statistics of contexts, cut into batches."""
    statistics = FeatureStatistics(N_FEATURES, config)
    for first in range(0, len(contexts), batch):
        statistics.add(*as_batch(contexts[first : first + batch]))
    statistics.finish()
    return statistics


def windows_of(
    contexts: list[torch.Tensor], before: int, after: int
) -> list[tuple[int | None, ...]]:
    """The tokens around every place, None outside its context."""
    found = []
    for dense in contexts:
        ids = ids_of(dense).tolist()
        for at in range(len(ids)):
            cells = range(at - before, at + after + 1)
            found.append(tuple(ids[i] if 0 <= i < len(ids) else None for i in cells))
    return found


class Brute:
    """One feature's statistics, from all of its activations at once."""

    def __init__(self, contexts: list[torch.Tensor], feature: int) -> None:
        self.feature = feature
        self.values: list[float] = []
        self.places: list[int] = []
        #: Per context with an active position: (value, place, the context's values, start).
        self.peaks: list[tuple[float, int, list[float], int]] = []
        self.contexts = contexts
        start = 0
        for dense in contexts:
            column = dense[:, feature].tolist()
            active = [i for i, v in enumerate(column) if v > 0]
            self.values += [column[i] for i in active]
            self.places += [start + i for i in active]
            if active:
                best = max(active, key=lambda i: (column[i], -i))
                self.peaks.append((column[best], start + best, column, start))
            start += len(column)

    @property
    def range(self) -> float:
        """The smallest power of two above the maximum."""
        return 2.0 ** (math.floor(math.log2(max(self.values))) + 1)

    def histogram(self, n_bins: int) -> list[int]:
        counts = [0] * n_bins
        for value in self.values:
            counts[int(value / self.range * n_bins)] += 1
        return counts

    def top(self, n: int, before: int, after: int) -> list[tuple[float, int]]:
        """The strongest contexts, of those whose windows hold the same tokens the strongest."""
        found: dict[tuple[int | None, ...], tuple[float, int]] = {}
        tokens = windows_of(self.contexts, before, after)
        for value, place, *_ in sorted(self.peaks, key=lambda x: (-x[0], x[1])):
            found.setdefault(tokens[place], (value, place))
        return list(found.values())[:n]

    def bands(self, n_bands: int, per_band: int) -> list[set[tuple[float, int]]]:
        found = defaultdict(list)
        for value, place, *_ in self.peaks:
            key = int(mixed(mixed(torch.tensor(place)) ^ self.feature))
            found[int(value / self.range * n_bands)].append((key, (value, place)))
        return [
            {one for _, one in sorted(found[b], reverse=True)[:per_band]} for b in range(n_bands)
        ]

    def window(self, place: int, before: int, after: int) -> list[float]:
        _, _, column, start = next(peak for peak in self.peaks if peak[1] == place)
        at = place - start
        cells = range(at - before, at + after + 1)
        return [column[i] if 0 <= i < len(column) else 0.0 for i in cells]

"""One feature out of the tables of a bundle."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .lazy_tables import LazyTables
from .report import Coactive, Example, ExampleGroup, FeatureReport, Histogram, Label, Ranked


class FeatureReader:
    """Makes reports of rows.

    Args:
        tables: The bundle's tables.
        metadata: Its ``bundle.json``.
        firsts: Layer -> its first row.
    """

    def __init__(
        self, tables: LazyTables, metadata: Mapping[str, Any], firsts: Mapping[int, int]
    ) -> None:
        self._tables, self._layers, self._firsts = tables, list(firsts), list(firsts.values())
        self._n_positions = max(1, int(metadata["n_positions"]))
        self._n_bands = int(metadata["statistics"]["n_bands"])
        self._before = int(metadata["statistics"]["before"])

    def report(self, key: tuple[int, int], row: int, label: Label | None) -> FeatureReport:
        """What is known about a feature.

        Args:
            key: Its layer and number.
            row: Its row.
            label: What it is said to mean.
        """
        n_active = int(self._tables.row("count", row))
        maximum = float(self._tables.row("maximum", row))
        return FeatureReport(
            layer=key[0],
            index=key[1],
            label=label,
            n_active=n_active,
            density=n_active / self._n_positions,
            max_activation=maximum,
            mean_activation=float(self._tables.row("total", row)) / max(1, n_active),
            histogram=self._histogram(row, n_active),
            groups=tuple(self._groups(row, n_active, maximum)),
            top_logits=self._ranked("top_logits", row),
            bottom_logits=self._ranked("bottom_logits", row),
            de_embedding=self._ranked("de_embedding", row),
            coactive=self._coactive(row),
        )

    def inactive(self, row: int, n: int) -> tuple[Example, ...]:
        """At most n of the reference windows in which a feature is not active."""
        starts, lengths = self._tables.row("reference.start"), self._tables.row("reference.length")
        idle = (~self._tables.row("in_reference", row)[: len(starts)]).nonzero().flatten().tolist()
        found = []
        for i in idle[:n]:
            start, length = int(starts[i]), int(lengths[i])
            context = self._tables.context(start)
            found.append(self._example(context, start, start + length, start, torch.zeros(length)))
        return tuple(found)

    def _histogram(self, row: int, n_active: int) -> Histogram:
        counts = self._tables.row("histogram", row).tolist()
        width = 2.0 ** int(self._tables.row("exponent", row)) / len(counts) if n_active else 0.0
        return Histogram(tuple(counts), width)

    def _ranked(self, name: str, row: int) -> Ranked:
        if f"{name}.token" not in self._tables:
            return ()
        tokens = self._tables.row(f"{name}.token", row).tolist()
        values = self._tables.row(f"{name}.value", row).tolist()
        return tuple(zip(map(self._tables.text, tokens), values, strict=True))

    def _coactive(self, row: int) -> tuple[Coactive, ...]:
        index = self._tables.row("coactive.index", row).tolist()
        overlap = self._tables.row("coactive.overlap", row).tolist()
        found = []
        for i, share in zip(index, overlap, strict=True):
            if i >= 0:
                at = bisect_right(self._firsts, i) - 1
                found.append(Coactive(self._layers[at], i - self._firsts[at], share))
        return tuple(found)

    def _groups(self, row: int, n_active: int, maximum: float) -> Iterator[ExampleGroup]:
        if not n_active:
            return
        seen = self._tables.row("top.seen", row).tolist()
        examples = zip(self._examples("top", row), seen, strict=False)
        top = tuple(replace(example, seen=n) for example, n in examples)
        yield ExampleGroup("Top", top[-1].value, maximum, top)
        width = 2.0 ** int(self._tables.row("exponent", row)) / self._n_bands
        for band in reversed(range(self._n_bands)):
            examples = self._examples("band", row, band)
            if examples:
                low, high = band * width, min((band + 1) * width, maximum)
                yield ExampleGroup(f"{low:.3g} to {high:.3g}", low, high, examples)

    def _examples(self, table: str, row: int, band: int | None = None) -> tuple[Example, ...]:
        values, peaks, windows = (
            part if band is None else part[band]
            for part in (self._tables.row(f"{table}.{n}", row) for n in ("value", "peak", "window"))
        )
        used = int((values > 0).sum())
        entries = zip(values[:used].tolist(), peaks[:used].tolist(), windows, strict=False)
        return tuple(self._window(value, peak, shares) for value, peak, shares in entries)

    def _window(self, value: float, peak: int, shares: Tensor) -> Example:
        """An example from its peak and the activations around it as shares of that."""
        context = self._tables.context(peak)
        _, first, last = context
        start, end = max(first, peak - self._before), min(last, peak - self._before + len(shares))
        cut = start - (peak - self._before)
        activations = shares[cut : cut + end - start].float() * value
        return self._example(context, start, end, peak, activations)

    def _example(
        self, context: tuple[int, int, int], start: int, end: int, peak: int, activations: Tensor
    ) -> Example:
        ids = self._tables.rows("tokens", start, end).tolist()
        number, first, _ = context
        return Example(
            tokens=tuple(map(self._tables.text, ids)),
            token_ids=tuple(ids),
            activations=tuple(activations.tolist()),
            peak=peak - start,
            context=number,
            start=start - first,
        )

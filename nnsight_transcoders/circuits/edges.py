"""Edge weights by sweeping the frozen model: plain tensors in, a matrix out (torch only).

Every source is a vector that stands at an output site and a position: a feature's decoder row times
its activation, an error vector, a token embedding. Every target is a cotangent. One sweep of a
batch of targets meets every source below them, and reads off all their edges with one product per
site and position.

Legend: T positions, B targets of a batch, D d_model, C columns (source nodes), m sources at a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import FrozenModel, Targets

#: Residual-stream rows (targets x positions) per batch: enough for matrix products to run at full
#: speed, little enough that a batch's working set stays near the caches (docs/benchmarks.md).
ROWS_PER_BATCH = 3072
#: Smaller batches are not worth their overhead.
MIN_BATCH = 32
#: Default bound on a batch's own memory, in bytes.
MEMORY_BUDGET = 512 * 2**20


@dataclass(frozen=True)
class SiteSources:
    """The sources at one output site, by position.

    Attributes:
        vector: ``(m, D)`` what each source writes there (see ``candidates.Engine.written``).
        column: ``(m,)`` the column of its node.
        starts: T + 1 offsets: the sources at position ``p`` are rows ``starts[p]:starts[p + 1]``.
    """

    vector: Tensor
    column: Tensor
    starts: list[int]

    @classmethod
    def build(
        cls, vector: Tensor, column: Tensor, position: Tensor, n_positions: int
    ) -> SiteSources:
        """Sort sources by position."""
        order = position.argsort(stable=True)
        counts = torch.bincount(position, minlength=n_positions)
        starts = [0, *counts.cumsum(0).tolist()]
        return cls(vector[order], column[order], starts)


def edge_rows(
    frozen: FrozenModel, sources: Mapping[int, SiteSources], targets: Targets, n_columns: int
) -> Tensor:
    """Edges from all sources into a batch of targets: ``(B, C)``.

    Args:
        frozen: The linear model.
        sources: Output site (layer, -1 for the embedding) -> its sources.
        targets: The batch, highest layer first.
        n_columns: C.
    """
    rows = targets.vector.new_zeros(len(targets.layer), n_columns)
    for site, g_nTD in frozen.sweep(targets):
        here = sources.get(site)
        if here is None:
            continue
        last = here.starts[g_nTD.shape[1]]
        block = g_nTD.new_empty(len(g_nTD), last)
        for position in range(g_nTD.shape[1]):
            start, stop = here.starts[position], here.starts[position + 1]
            if stop > start:
                block[:, start:stop] = g_nTD[:, position] @ here.vector[start:stop].T
        rows[: len(g_nTD)].index_add_(1, here.column[:last], block)
    return rows


def batch_size(
    n_positions: int, d_model: int, n_columns: int, itemsize: int, memory: int = MEMORY_BUDGET
) -> int:
    """How many targets to sweep at once.

    A target holds about six residual-stream copies while it passes a layer, and two rows of edges.
    """
    per_target = itemsize * (6 * n_positions * d_model + 2 * n_columns)
    return max(1, min(ROWS_PER_BATCH // n_positions, memory // per_target))


def batches(layer: Tensor, position: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of targets in batches that make short sweeps: by position, then from the top down.

    A batch's sweep is as wide as its last position, and a target joins it at its own layer. A few
    targets still make several batches, so that those at early positions have narrow sweeps.
    """
    size = min(size, max(MIN_BATCH, len(layer) // 8))
    order = (position * (int(layer.max()) + 1) - layer).argsort(stable=True)
    for chunk in order.split(size):
        yield chunk[layer[chunk].argsort(descending=True, stable=True)]

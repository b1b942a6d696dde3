"""Edge weights by sweeping the frozen model: plain tensors in, a matrix out (torch only).

Every source is a vector that stands at an output site and a position: a feature's decoder row times
its activation, an error vector, a token embedding. Every target is a cotangent. One sweep of a
batch of targets meets every source below them, and reads off their edges with one product per
site and position.

Legend: T positions, B targets of a batch, D d_model, C columns (source nodes), m sources of one
kind at a site, u distinct vectors among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import EMBEDDING, FrozenModel, Targets

#: Residual-stream rows (targets x positions) per batch: enough for matrix products to run at full
#: speed, little enough that a batch's working set stays near the caches (docs/benchmarks.md).
ROWS_PER_BATCH = 3072
#: Targets per batch of a long prompt, so that what is read once a batch is shared by some.
FEWEST_TARGETS = 4
#: Smaller batches are not worth their overhead.
MIN_BATCH = 32
#: Default bound on a batch's own memory, in bytes.
MEMORY_BUDGET = 512 * 2**20


@dataclass(frozen=True)
class SiteSources:
    """Sources of one kind at one output site, by position: each writes a multiple of a row.

    Attributes:
        rows: ``(u, D)`` the vectors, as they stand at the output site; or what reads them. Those
            of features may be in a narrower dtype than edges.
        row: ``(m,)`` which of them each source writes; None: row ``p`` is the source at ``p``.
        factor: ``(m,)`` and how many times; None: once.
        column: ``(m,)`` the column of its node.
        starts: T + 1 offsets: the sources at position ``p`` are ``starts[p]:starts[p + 1]``.
    """

    rows: Tensor | Callable[[], Tensor]
    row: Tensor | None
    factor: Tensor | None
    column: Tensor
    starts: list[int]

    @classmethod
    def build(
        cls,
        rows: Tensor | Callable[[], Tensor],
        row: Tensor,
        factor: Tensor,
        column: Tensor,
        position: Tensor,
        n_positions: int,
    ) -> SiteSources:
        """Sort sources by their ``position (m,)``."""
        order = position.argsort(stable=True)
        counts = torch.bincount(position, minlength=n_positions)
        starts = [0, *counts.cumsum(0).tolist()]
        return cls(rows, row[order], factor[order], column[order], starts)

    @classmethod
    def everywhere(cls, vectors: Tensor, first_column: int) -> SiteSources:
        """One source per position, ``vectors (T, D)``, in neighbouring columns."""
        at = torch.arange(len(vectors), device=vectors.device)
        return cls(vectors, None, None, first_column + at, list(range(len(vectors) + 1)))

    @classmethod
    def attended(cls, vectors: Tensor, spread: Tensor, first_column: int) -> SiteSources:
        """``everywhere`` as it stands behind an attention: each source at all later positions.

        Args:
            vectors: ``(T, D)`` before attention.
            spread: ``(T, T, D)`` what they add through it (``FoldedLayer.spread``).
            first_column: The column of the first.
        """
        n_positions = len(vectors)
        position, source = torch.tril_indices(n_positions, n_positions, device=vectors.device)
        rows = spread[position, source]
        rows[position == source] += vectors
        row = torch.arange(len(rows), device=rows.device)
        factor, column = rows.new_ones(len(rows)), first_column + source
        return cls.build(rows, row, factor, column, position, n_positions)

    def read_off(self, g_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Edges from the sources at the positions of cotangents ``g``, which stand at the site.

        Returns:
            Their columns ``(k,)`` and the edges ``(B, k)``.
        """
        rows = self.rows if isinstance(self.rows, Tensor) else self.rows()
        last = self.starts[g_BTD.shape[1]]
        if self.row is None or self.factor is None:
            edges_TB1 = torch.bmm(g_BTD.transpose(0, 1), rows[:last, :, None])
            return self.column[:last], edges_TB1[:, :, 0].T
        edges = g_BTD.new_empty(len(g_BTD), last)
        for position in range(g_BTD.shape[1]):
            start, stop = self.starts[position], self.starts[position + 1]
            if stop > start:
                here = rows[self.row[start:stop]].to(g_BTD.dtype)
                torch.mm(g_BTD[:, position], here.T, out=edges[:, start:stop])
        return self.column[:last], edges.mul_(self.factor[:last])


#: Output site (layer, or a place of ``linear``) -> the sources there.
Sources = Mapping[int, Sequence[SiteSources]]


@torch.no_grad()
def edge_rows(frozen: FrozenModel, sources: Sources, targets: Targets, n_columns: int) -> Tensor:
    """Edges from all sources into a batch of targets: ``(B, C)``.

    Args:
        frozen: The linear model.
        sources: All of them.
        targets: The batch, highest layer first.
        n_columns: C.
    """
    rows = targets.vector.new_zeros(len(targets.layer), n_columns)
    for site, g_nTD in frozen.sweep(targets):
        if site >= 0 and site in sources:
            g_nTD = frozen.at_output(site, g_nTD)
        for part in sources.get(site, ()):
            columns, edges = part.read_off(g_nTD)
            rows[: len(g_nTD)].index_add_(1, columns, edges)
        if site < 0 and EMBEDDING not in sources:  # nothing stands below
            break
    return rows


def batch_size(
    n_positions: int, d_model: int, n_columns: int, itemsize: int, memory: int = MEMORY_BUDGET
) -> int:
    """How many targets to sweep at once.

    A target holds about six residual-stream copies while it passes a layer, and two rows of edges.
    """
    per_target = itemsize * (6 * n_positions * d_model + 2 * n_columns)
    wanted = max(FEWEST_TARGETS, ROWS_PER_BATCH // n_positions)
    return max(1, min(wanted, memory // per_target))


def batches(layer: Tensor, position: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of targets in batches that make short sweeps: by position, then from the top down.

    A batch's sweep is as wide as its last position, and a target joins it at its own layer. A few
    targets still make several batches, so that those at early positions have narrow sweeps.
    """
    size = min(size, max(MIN_BATCH, len(layer) // 8))
    order = (position * (int(layer.max()) + 1) - layer).argsort(stable=True)
    for chunk in order.split(size):
        yield chunk[layer[chunk].argsort(descending=True, stable=True)]

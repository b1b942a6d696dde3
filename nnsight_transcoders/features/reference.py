"""A random sample of windows of a corpus, and which features are active in each (torch only).

What a feature is not active on is as telling as what it is active on; these windows are the same
for all features. Legend: F features, R windows, B contexts, n active entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .entries import SparseActivations
from .tables import BestTable, mixed


class ReferenceWindows:
    """At most R contexts drawn uniformly, of each one window at a random place.

    Args:
        n_features: F.
        n_windows: R.
        width: Tokens of a window; a shorter context is its own window.

    Attributes:
        active: ``(F, R)`` whether a feature is active in a window.
    """

    def __init__(self, n_features: int, n_windows: int, width: int) -> None:
        # "column" is the window's column of ``active``.
        one = (torch.int64, ())
        integers = {"start": one, "length": one, "column": one}
        self._table = BestTable(1, n_windows, integers)
        self._width = width
        self.active = torch.zeros(n_features, n_windows, dtype=torch.bool)

    @property
    def _used(self) -> Tensor:
        return self._table.keys[0] >= 0

    @property
    def start(self) -> Tensor:
        """Where the windows start in the corpus, in the order of ``active``'s columns."""
        return self._table.payload["start"][0][self._used]

    @property
    def length(self) -> Tensor:
        """Tokens of each."""
        return self._table.payload["length"][0][self._used]

    def add(
        self, lengths: Tensor, starts: Tensor, active: SparseActivations, place: Tensor
    ) -> None:
        """Let a batch's contexts into the sample, and note what is active in their windows.

        Args:
            lengths: ``(B,)`` tokens of each context.
            starts: ``(B,)`` where it starts in the corpus.
            active: What is active.
            place: ``(n,)`` where each entry is in the corpus.
        """
        key = mixed(mixed(starts) ^ -1)
        if not self._table.accepts(torch.zeros_like(starts), key).any():
            return
        n_windows = self.active.shape[1]
        size = lengths.clamp_max(self._width)
        start = starts + key % (lengths - size + 1)
        # Until columns are given out, a number from R on stands for a context of the batch.
        context = torch.arange(len(starts))
        payload = {"start": start, "length": size, "column": context + n_windows}
        self._table.offer(torch.zeros_like(starts), key, payload)
        column = self._table.payload["column"][0]
        new = self._used & (column >= n_windows)
        free = torch.ones(n_windows, dtype=torch.bool)
        free[column[self._used & ~new]] = False
        given = free.nonzero().flatten()[: int(new.sum())]
        column_of = torch.full((len(starts),), -1)
        column_of[column[new] - n_windows] = given
        column[new] = given
        self.active[:, given] = False
        mine = active.context
        inside = (column_of[mine] >= 0) & (place >= start[mine]) & (place < (start + size)[mine])
        self.active[active.feature[inside], column_of[mine[inside]]] = True

    def sort(self) -> None:
        """Put the windows, and the columns of ``active``, in the order of their keys."""
        self._table.sort()
        column, used = self._table.payload["column"][0], self._used
        free = torch.ones(len(column), dtype=torch.bool)
        free[column[used]] = False
        self.active = self.active[:, torch.cat([column[used], free.nonzero().flatten()])]
        column[used] = torch.arange(int(used.sum()))

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        return {"active": self.active, **self._table.tensors()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave."""
        self.active.copy_(tensors["active"])
        self._table.load(tensors)

"""Tables that keep the best few entries of every row of a stream (torch only).

Max-activating examples, random samples of examples and sketches of where a feature is active are
all the same thing: of what was offered to a row, the entries with the largest keys. A random sample
is kept by a key that is a hash of the entry ("bottom-k sampling": Cohen and Kaplan 2007,
"Summarizing Data using Bottom-k Sketches"), so what a table ends up with depends on what was
offered and not on the order or on how it was cut into batches.

Legend: n entries, R rows, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Key of an empty slot; every real key is at least 0.
EMPTY = -1

#: Rows that are merged at a time.
_CHUNK = 8192

#: Name of a payload -> its dtype and the shape of one entry.
Payload = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def mixed(x: Tensor) -> Tensor:
    """A hash of integers: int64 to int64 from 0 to 2^63 - 1.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"), whose multiplications wrap around; the sign bit is dropped.
    """
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (x ^ _shifted(x, 31)) & (2**63 - 1)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A right shift that fills with zeros."""
    return (x >> by) & (2 ** (64 - by) - 1)


class BestTable:
    """The entries with the largest keys of each row, with what they carry.

    Args:
        n_rows: R.
        n_slots: K.
        payload: What an entry carries besides its key.
        distinct: Name of an integer payload: of the entries of a row in which it is the same, only
            that with the largest key is kept.

    Attributes:
        keys: ``(R, K)`` int64, ``EMPTY`` where a slot is free; in no order until ``sort``.
        payload: Name -> ``(R, K, ...)``.
    """

    def __init__(
        self, n_rows: int, n_slots: int, payload: Payload, distinct: str | None = None
    ) -> None:
        self._distinct = distinct
        self.keys = torch.full((n_rows, n_slots), EMPTY)
        self.payload = {
            name: torch.zeros(n_rows, n_slots, *shape, dtype=dtype)
            for name, (dtype, shape) in payload.items()
        }
        self._floor = torch.full((n_rows,), EMPTY)

    @property
    def n_slots(self) -> int:
        """K."""
        return self.keys.shape[1]

    def accepts(self, row: Tensor, key: Tensor) -> Tensor:
        """Which entries ``(n,)`` are better than the worst that their row holds."""
        return key > self._floor[row]

    def offer(self, row: Tensor, key: Tensor, payload: Mapping[str, Tensor]) -> None:
        """Offer entries to rows.

        Args:
            row: ``(n,)``.
            key: ``(n,)``, at least 0 and different within a row.
            payload: ``(n, ...)`` by name.
        """
        order = self._ranked(row, key, payload)
        if not len(order):
            return
        row = row[order]
        rows, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0)
        for first in range(0, len(rows), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            start = int(ends[first] - counts[first])
            picked = order[start : int(ends[chunk][-1])]
            entries = {name: values[picked] for name, values in payload.items()}
            self._merge(rows[chunk], counts[chunk], key[picked], entries)

    def _ranked(self, row: Tensor, key: Tensor, payload: Mapping[str, Tensor]) -> Tensor:
        """The entries that can enter, by row and then from the largest key, at most K per row."""
        kept = self.accepts(row, key).nonzero().flatten()
        order = kept[key[kept].argsort(descending=True, stable=True)]
        order = order[row[order].argsort(stable=True)]
        if self._distinct is not None:
            what = mixed(payload[self._distinct][order] ^ mixed(row[order]))
            order = order[~_repeated(what[None])[0]]
        if not len(order):
            return order
        return order[rank_in_group(row[order]) < self.n_slots]

    def _merge(
        self, rows: Tensor, counts: Tensor, key: Tensor, payload: Mapping[str, Tensor]
    ) -> None:
        """Put entries, grouped by row, beside what the rows hold, and keep the best K of both."""
        at = torch.arange(len(rows)).repeat_interleave(counts)
        column = self.n_slots + rank_in_group(at)
        width = self.n_slots + int(counts.max())
        keys = torch.full((len(rows), width), EMPTY)
        keys[:, : self.n_slots] = self.keys[rows]
        keys[at, column] = key
        if self._distinct is not None:
            what = torch.zeros(len(rows), width, dtype=torch.int64)
            what[:, : self.n_slots] = self.payload[self._distinct][rows]
            what[at, column] = payload[self._distinct]
            order = keys.argsort(dim=1, descending=True)
            again = _repeated(what.gather(1, order))
            keys.masked_fill_(torch.zeros_like(again).scatter(1, order, again), EMPTY)
        best = keys.topk(self.n_slots)
        self.keys[rows], self._floor[rows] = best.values, best.values[:, -1]
        line = torch.arange(len(rows))[:, None]
        for name, held in self.payload.items():
            both = torch.zeros(len(rows), width, *held.shape[2:], dtype=held.dtype)
            both[:, : self.n_slots] = held[rows]
            both[at, column] = payload[name]
            held[rows] = both[line, best.indices]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Remove and return all entries of some rows: which of ``rows``, keys, payloads."""
        at, slot = (self.keys[rows] != EMPTY).nonzero(as_tuple=True)
        keys = self.keys[rows[at], slot]
        payload = {name: held[rows[at], slot] for name, held in self.payload.items()}
        self.keys[rows], self._floor[rows] = EMPTY, EMPTY
        for held in self.payload.values():
            held[rows] = 0
        return at, keys, payload

    def sort(self) -> None:
        """Put the entries of each row in order, the largest key first."""
        for first in range(0, len(self.keys), _CHUNK):
            rows = slice(first, first + _CHUNK)
            keys, order = self.keys[rows].sort(dim=1, descending=True, stable=True)
            self.keys[rows] = keys
            line = torch.arange(len(keys))[:, None]
            for held in self.payload.values():
                held[rows] = held[rows][line, order]

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        return {"keys": self.keys, **self.payload}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave."""
        self.keys.copy_(tensors["keys"])
        self._floor.copy_(self.keys.min(dim=1).values)
        for name, held in self.payload.items():
            held.copy_(tensors[name])


def _repeated(values: Tensor) -> Tensor:
    """Which entries ``(R, n)`` stand in their row once more, further left."""
    ordered, order = values.sort(dim=1, stable=True)
    again = torch.zeros_like(values, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)


def rank_in_group(groups: Tensor) -> Tensor:
    """Of each entry ``(n,)``, how many of the same group stand before it; groups are together."""
    if not len(groups):
        return groups
    _, counts = torch.unique_consecutive(groups, return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(groups)) - starts

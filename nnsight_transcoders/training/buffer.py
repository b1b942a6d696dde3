"""The shuffled buffer of activations that training batches are drawn from.

It is filled, shuffled, served and filled anew, so that its memory is bounded and its content is a
function of a position in the data and a number: a checkpoint holds these and not the activations,
and a run that goes on fills the buffer to the same content again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.hub.staging import write_tensors

from .data import Rows
from .stream import SiteReader, kept_positions, padded

#: Layer -> input and output values of a batch, ``(batch, d_model)`` each.
Batch = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Share:
    """Which of the rows a process takes: every ``world``-th, beginning with its rank."""

    rank: int = 0
    world: int = 1


class TokenBatches:
    """Rows of token ids in batches, with the mask of the positions that are trained on."""

    def __init__(
        self, rows: Rows, size: int, leading: int, special: frozenset[int], pad: int, share: Share
    ) -> None:
        self.rows, self._size, self._share = rows, size, share
        self._leading, self._special, self._pad = leading, special, pad

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            mine = self._next_rows()
            if not mine:
                return
            ids = padded(mine, self._pad)
            yield ids, kept_positions(ids, [len(r) for r in mine], self._leading, self._special)

    def _next_rows(self) -> list[list[int]]:
        """The process' share of the next ``size * world`` rows; fewer at the end of the data."""
        every = []
        for row in self.rows:
            every.append(row)
            if len(every) == self._size * self._share.world:
                break
        return every[self._share.rank * self._size : (self._share.rank + 1) * self._size]


class ActivationBuffer:
    """Batches of activations in shuffled order.

    Args:
        batches: Where token ids come from.
        reader: What makes activations of them.
        size: Positions in the buffer.
        batch_size: Positions in a batch.
        seed: Of the order.
        devices: Layer -> where its activations are kept.
        dtype: What they are kept in.
        cache: Where buffers are kept for further runs, if anywhere.
    """

    def __init__(
        self,
        batches: TokenBatches,
        reader: SiteReader,
        *,
        size: int,
        batch_size: int,
        seed: int,
        devices: Mapping[int, torch.device],
        dtype: torch.dtype,
        cache: ActivationCache | None = None,
    ) -> None:
        self._batches, self._reader, self._cache = batches, reader, cache
        self._size = size // batch_size * batch_size
        self._batch_size, self._seed = batch_size, seed
        self._devices, self._dtype = dict(devices), dtype
        self._values: Batch = {}
        self._order = torch.empty(0, dtype=torch.long)
        self._number, self._next = -1, 0
        self._start: dict[str, Any] = batches.rows.state()

    def next_batch(self) -> Batch | None:
        """The next batch, or None at the end of data that cannot be read again."""
        if self._next + self._batch_size > len(self._order):
            self._number += 1
            self._next = 0
            if not self._fill():
                return None
        chosen = self._order[self._next : self._next + self._batch_size]
        self._next += self._batch_size
        return self._take(chosen)

    def peek(self) -> Batch:
        """A whole buffer's activations without moving on: what weights are initialised from."""
        if self._number < 0:
            self._number = 0
            if not self._fill():
                raise InputError(
                    f"the training data ends before one batch of {self._batch_size} positions: "
                    "give more text or lower batch_size"
                )
        return self._take(slice(0, len(self._order)))

    def _take(self, chosen: Tensor | slice) -> Batch:
        taken = {}
        for layer, (x, y) in self._values.items():
            index = chosen.to(x.device) if isinstance(chosen, Tensor) else chosen
            first = x[index]
            taken[layer] = (first, first if y is x else y[index])
        return taken

    def _fill(self) -> bool:
        """Fill the buffer anew; whether there is at least one batch in it."""
        self._start = self._batches.rows.state()
        if self._cache is not None and self._cache.has(self._number):
            self._values, after = self._cache.load(self._number, self._devices)
            self._batches.rows.restore(after)
        else:
            self._compute()
            if self._cache is not None:
                self._cache.save(self._number, self._values, self._batches.rows.state())
        n = len(next(iter(self._values.values()))[0]) if self._values else 0
        n = n // self._batch_size * self._batch_size
        generator = torch.Generator().manual_seed((self._seed << 32) + self._number)
        self._order = torch.randperm(n, generator=generator)
        return n > 0

    def _compute(self) -> None:
        """Run the model on as many rows as fill the buffer; at the end of the data, on the rest."""
        chosen, n = [], 0
        for ids, kept in self._batches:
            if kept.any():
                chosen.append((ids, kept))
                n += int(kept.sum())
            if n >= self._size:
                break
        filled, self._values = 0, {} if n < self._size else self._values
        for read in self._reader(chosen):
            if not self._values:
                self._allocate(read, min(n, self._size))
            filled = self._store(read, filled)

    def _allocate(self, like: Batch, size: int) -> None:
        for layer, (x, y) in like.items():
            device = self._devices[layer]
            room = torch.empty(size, x.shape[1], dtype=self._dtype, device=device)
            self._values[layer] = (room, room if y is x else torch.empty_like(room))

    def _store(self, read: Batch, start: int) -> int:
        stop = start
        for layer, pair in read.items():
            rooms = self._values[layer]
            stop = min(start + len(pair[0]), len(rooms[0]))
            for room, value in zip(rooms, pair, strict=True):
                room[start:stop] = value[: stop - start]
        return stop

    # -- position --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The position, JSON-ready: where the buffer begins, and how far it was served."""
        return {"number": self._number, "next": self._next, "rows": self._start}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position and fill the buffer to what it held there.

        Raises:
            MismatchError: The data are other ones.
        """
        self._batches.rows.restore(state["rows"])
        self._number = state["number"]
        if self._number >= 0:
            self._fill()
        self._next = state["next"]


class ActivationCache:
    """Buffers on disk, one file each, for further runs on the same activations.

    Args:
        folder: Where; made if need be.
        fingerprint: Tells apart activations of other models, sites, layers or data.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder / fingerprint

    def _path(self, number: int) -> Path:
        return self._folder / f"buffer_{number:06d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a buffer is there."""
        return self._path(number).is_file()

    def save(self, number: int, values: Batch, after: Mapping[str, Any]) -> None:
        """Keep a buffer and the position in the data after it.

        Raises:
            InputError: It cannot be written (a full disk, say).
        """
        tensors = {}
        for layer, (x, y) in values.items():
            tensors[f"{layer}.x"] = x
            if y is not x:
                tensors[f"{layer}.y"] = y
        write_tensors(self._path(number), tensors, {"after": json.dumps(after)})

    def load(
        self, number: int, devices: Mapping[int, torch.device]
    ) -> tuple[Batch, dict[str, Any]]:
        """A buffer and the position in the data after it.

        Raises:
            CheckpointError: The file is damaged.
        """
        path, values = self._path(number), {}
        try:
            with safe_open(path, "pt") as file:
                after = json.loads((file.metadata() or {})["after"])
                names = set(file.keys())
                for layer, device in devices.items():
                    x = file.get_tensor(f"{layer}.x").to(device)
                    other = f"{layer}.y"
                    y = file.get_tensor(other).to(device) if other in names else x
                    values[layer] = (x, y)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): delete it") from error
        return values, after

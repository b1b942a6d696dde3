"""Rows of tables in a safetensors file, read when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError

#: Token texts that are kept once they were read.
_CACHED = 2**16


class LazyTables:
    """The tables of a feature bundle (see ``bundle_files.py``), mapped and not loaded.

    Args:
        path: The file.
        n_features: How many it must have.

    Raises:
        CheckpointError: The file is missing, damaged or of another bundle; so does every method.
    """

    def __init__(self, path: Path, n_features: int) -> None:
        self._path = path
        with self._reading():
            self._file = safe_open(path, "pt")
            self._names = set(self._file.keys())
            self._slices: dict[str, Any] = {}
            shape = self._slice("count").get_shape()
            self._n_contexts = self._slice("context_start").get_shape()[0] - 1
        if shape != [n_features]:
            raise CheckpointError(
                f"{path} has tables of {shape[0]} features, but bundle.json says {n_features}: "
                "the two files do not belong together"
            )
        self._texts: dict[int, str] = {}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what safetensors raises into one error that names the file."""
        try:
            yield
        except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{self._path} is damaged or has no tables of a feature bundle: {error}; collect "
                "the features again"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            self._slices[name] = self._file.get_slice(name)
        return self._slices[name]

    def row(self, name: str, row: int | None = None) -> Tensor:
        """One row of a table, or a whole small one."""
        with self._reading():
            table = self._slice(name)
            return table[:] if row is None else table[row]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows ``start`` to ``end`` of a table."""
        with self._reading():
            return self._slice(name)[start:end]

    def context(self, place: int) -> tuple[int, int, int]:
        """The context that a place of the corpus is in: its number, start and end."""
        number = (
            bisect_right(
                range(self._n_contexts), place, key=lambda i: int(self.row("context_start", i))
            )
            - 1
        )
        start, end = self.rows("context_start", number, number + 2).tolist()
        if not start <= place < end:
            raise CheckpointError(f"{self._path} is damaged: it has no place {place}")
        return number, start, end

    def text(self, token: int) -> str:
        """The text of a token id."""
        if token not in self._texts:
            if len(self._texts) >= _CACHED:
                self._texts.clear()
            start, end = self.rows("vocabulary.start", token, token + 2).tolist()
            encoded = bytes(self.rows("vocabulary.bytes", start, end).tolist())
            self._texts[token] = encoded.decode("utf-8", "replace")
        return self._texts[token]

"""Where a checkpoint's files are: what a folder and a Hub repository have in common.

A snapshot lists file names and hands out one file at a time, so that a format never needs to know
whether it reads a folder or the Hub (``hub_snapshot``). No name leads out of the snapshot.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.tensors import TensorInfo, open_tensors, read_header

#: How many names a message lists before "and so many more".
SHOWN = 12


class Snapshot(ABC):
    """The files of one checkpoint.

    Attributes:
        files: Their names, relative, with ``/``, sorted.
        where: What to call it in messages.
        complete: Whether ``files`` is all there is. False when the Hub could not be asked and
            only the cache was listed.
        cache_dir: The cache the caller named, for what is converted from this checkpoint.
        open_other: Opens another Hub repository (id, revision) the way this one was opened; set by
            ``open_snapshot``.
    """

    files: tuple[str, ...]
    where: str
    complete: bool = True
    cache_dir: str | Path | None = None
    open_other: Callable[[str, str | None], Snapshot] | None = None

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Repository and commit, or the folder."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """One file on this machine, downloaded if need be.

        Raises:
            CheckpointError: No such file, a name or link that leads out, or the Hub refuses.
        """

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file; a file that is not here yet is not downloaded."""
        return read_header(self.path(name))

    def tensor(self, name: str, key: str) -> Tensor:
        """One tensor of a safetensors file; of a file that is not here yet, nothing else is
        downloaded.

        Raises:
            CheckpointError: No such file or tensor, or it cannot be read.
        """
        path = self.path(name)
        with open_tensors(path) as handle:
            if key not in set(handle.keys()):
                raise CheckpointError(f"{path} has no tensor {key}")
            return handle.get_tensor(key)

    def open(self, name: str) -> IO[bytes]:
        """A file as a seekable stream; one that is not here yet is downloaded as it is read."""
        try:
            return self.path(name).open("rb")
        except OSError as error:
            raise CheckpointError(f"cannot read {name} of {self.where}: {error}") from error

    def headers(self, names: Sequence[str]) -> dict[str, dict[str, TensorInfo]]:
        """Several headers, read at the same time."""
        with ThreadPoolExecutor(max_workers=8) as pool:
            return dict(zip(names, pool.map(self.header, names), strict=True))

    def text(self, name: str) -> str:
        """A small text file."""
        try:
            return self.path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {name} of {self.where}: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file that holds an object."""
        try:
            data = json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{name} of {self.where} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{name} of {self.where} should hold a JSON object")
        return data

    def require(self, name: str) -> None:
        """Check a name, and that the snapshot has it.

        Raises:
            CheckpointError: It leads out of the snapshot, or is not there.
        """
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise CheckpointError(
                f"{self.where} names a file {name!r} outside of itself; it is refused. Do not use "
                "this checkpoint unless you know why"
            )
        if self.complete and name not in self.files:
            raise CheckpointError(f"{self.where} has no file {name}; it has {self.listing()}")

    def listing(self) -> str:
        """The first few file names, for messages."""
        shown = ", ".join(self.files[:SHOWN]) or "no files"
        more = len(self.files) - SHOWN
        return shown + (f" and {more} more" if more > 0 else "")


class LocalSnapshot(Snapshot):
    """A folder on this machine.

    Args:
        folder: The folder.
        provenance: Replaces the folder's path as what it is called (the builtin sets).
    """

    def __init__(self, folder: Path, provenance: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.where = str(folder)
        self._provenance = provenance or {"folder": str(folder.resolve())}
        self._roots = _allowed_roots(folder.resolve())
        names: list[str] = []
        for parent, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names += [(Path(parent) / name).relative_to(folder).as_posix() for name in files]
        self.files = tuple(sorted(names))

    def provenance(self) -> dict[str, Any]:
        return dict(self._provenance)

    def path(self, name: str) -> Path:
        self.require(name)
        path = self.folder / name
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise CheckpointError(
                f"{path} is a link to {real}, outside of the checkpoint; it is refused. Copy the "
                "file into the folder if you trust it"
            )
        return path


def _allowed_roots(folder: Path) -> tuple[Path, ...]:
    """The folder and, where it is a snapshot inside a Hub cache, the blobs its links point to."""
    for inside in (folder, *folder.parents):
        repo = inside.parent.parent
        if inside.parent.name == "snapshots" and (repo / "blobs").is_dir():
            # Newer caches keep blobs that repositories share beside the repositories' folders.
            return (folder, repo / "blobs", repo.parent / "blobs")
    return (folder,)

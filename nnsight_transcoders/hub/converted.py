"""Files that cannot be read lazily (npz, pickles), converted once into safetensors.

``ConvertedSnapshot`` stands in front of a snapshot: asked for a file, it hands out the safetensors
copy, which it makes on first use, one file at a time, and keeps. So opening is lazy and single rows
can be read, as for any other format. Copies are kept per commit (for a folder: per path, size and
time of change) under ``cache_dir/assets``, or where ``huggingface_hub`` keeps assets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assets import LIBRARY, assets_folder
from nnsight_transcoders.hub.hub_snapshot import HubSnapshot
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.staging import write_tensors
from nnsight_transcoders.hub.tensors import read_header

#: Part of every copy's place: changes when a conversion does, so that old copies are not used.
VERSION = 1

Convert = Callable[[IO[bytes], str], dict[str, Tensor]]
T = TypeVar("T")


def read_heads(
    snapshot: Snapshot, names: Sequence[str], read: Callable[[IO[bytes], str], T]
) -> dict[str, T]:
    """What ``read`` makes of several files (a stream, and what to call it), at the same time.

    The files are those of the real snapshot; one that is not here yet is not downloaded.
    """

    def one(name: str) -> T:
        with snapshot.open(name) as file:
            return read(file, f"{name} of {snapshot.where}")

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


class ConvertedSnapshot(Snapshot):
    """A snapshot whose weight files are seen as safetensors files in the canonical form.

    Args:
        snapshot: The real one.
        kind: The format's name, part of the copies' place.
        convert: Reads a file (a stream, and what to call it) into the tensors of the copy.
    """

    def __init__(self, snapshot: Snapshot, kind: str, convert: Convert) -> None:
        self._snapshot, self._kind, self._convert = snapshot, kind, convert
        self.files, self.where = snapshot.files, snapshot.where
        self.complete, self.cache_dir = snapshot.complete, snapshot.cache_dir

    def provenance(self) -> dict[str, Any]:
        return self._snapshot.provenance()

    def path(self, name: str) -> Path:
        """The safetensors copy of a file, made if it is not there or is damaged."""
        self.require(name)
        copy = self._copy(name)
        if _is_readable(copy):
            return copy
        where = f"{name} of {self.where}"
        original = self._snapshot.path(name)
        with original.open("rb") as file:
            tensors = self._convert(file, where)
        write_tensors(copy, tensors, {"library": LIBRARY, "converted_from": name})
        for other in copy.parent.glob(f"{copy.name.split('@')[0]}@*.safetensors"):
            if other != copy:  # of an earlier state of the file
                other.unlink(missing_ok=True)
        return copy

    def _copy(self, name: str) -> Path:
        """Where the copy of a file is, made or not."""
        snapshot = self._snapshot
        if isinstance(snapshot, HubSnapshot):
            inside = f"{snapshot.subfolder}/{name}"
            place, state = (snapshot.repo_id, snapshot.commit), "copy"
        else:
            original = snapshot.path(name).resolve()
            stat = original.stat()
            inside = str(original)
            place, state = ("folder", "files"), f"{stat.st_size}-{stat.st_mtime_ns}"
        digest = hashlib.sha256(f"{self._kind}\0{VERSION}\0{inside}".encode()).hexdigest()[:24]
        folder = assets_folder(self.where, self.cache_dir, *place)
        return folder / f"{digest}@{state}.safetensors"


def _is_readable(copy: Path) -> bool:
    if not copy.is_file():
        return False
    try:
        read_header(copy)
    except CheckpointError:
        return False
    return True

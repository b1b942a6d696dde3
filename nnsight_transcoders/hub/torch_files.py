"""Files written by ``torch.save``, read without torch's unpickler.

Zip files (torch 1.6 on) hold ``{name}/data.pkl`` and one entry per storage, ``{name}/data/{key}``.
Older files are five pickles in a row (a magic number, a version, the machine, the object, the
storages' keys), then for each storage a count and the numbers. Either way the pickle gives records
(``restricted_pickle``), and the numbers are read here, into tensors whose bounds are checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.archives import Archive, open_archive
from nnsight_transcoders.hub.restricted_pickle import (
    StorageRef,
    TensorRecord,
    load_restricted,
    shown,
)

_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_COUNT = 8  # bytes before each legacy storage: how many numbers follow

ReadStorage = Callable[[StorageRef], bytearray]


@contextmanager
def open_torch_file(
    file: IO[bytes], where: str, stand_ins: Mapping[tuple[str, str], type] | None = None
) -> Iterator[tuple[Any, Callable[[TensorRecord], Tensor]]]:
    """What a torch file holds, with records for tensors, and a function that reads such a record.

    Args:
        file: A seekable file.
        where: What to call it in messages.
        stand_ins: See ``load_restricted``.

    Raises:
        CheckpointError: Not a torch file, a damaged one, or one that asks for more than weights.
    """
    start = file.read(4)
    file.seek(0)
    if start == _ZIP:
        with open_archive(file, where, stored=True) as archive:
            content, read = _open_zip(archive, where, stand_ins)
            yield content, lambda record: _tensor(record, read, where)
    else:
        content, read = _open_legacy(file, where)
        yield content, lambda record: _tensor(record, read, where)


def _open_zip(
    archive: Archive, where: str, stand_ins: Mapping[tuple[str, str], type] | None
) -> tuple[Any, ReadStorage]:
    pickles = [name for name in archive.entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise CheckpointError(f"{where} is a zip, but no torch file: it has no {{name}}/data.pkl")
    folder = pickles[0].split("/")[0]
    order = f"{folder}/byteorder"
    if order in archive.entries and archive.head(order, 8) != b"little":
        raise CheckpointError(f"{where} was written on a big-endian machine, which is not read")

    def read(storage: StorageRef) -> bytearray:
        name, size = f"{folder}/data/{storage.key}", _size(storage)
        if name not in archive.entries or archive.entries[name].file_size != size:
            raise CheckpointError(f"{where} has no storage {storage.key} of {size} bytes in it")
        return archive.read(name)

    return load_restricted(BytesIO(archive.read(pickles[0])), where, stand_ins), read


def _open_legacy(file: IO[bytes], where: str) -> tuple[Any, ReadStorage]:
    if load_restricted(file, where) != _LEGACY_MAGIC:
        raise CheckpointError(f"{where} is not a file written by torch.save")
    version, machine = load_restricted(file, where), load_restricted(file, where)
    if version != _LEGACY_VERSION or not isinstance(machine, dict):
        raise CheckpointError(
            f"{where} is of another version of torch's format than {_LEGACY_VERSION}: not read"
        )
    if machine.get("little_endian") is not True:
        raise CheckpointError(f"{where} was written on a big-endian machine, which is not read")
    content, keys = load_restricted(file, where), load_restricted(file, where)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{where}: its list of storages is not one")
    data = file.tell()

    def read(storage: StorageRef) -> bytearray:
        for ref, start in _legacy_places(content, keys, data, where):
            if ref.key == storage.key:
                return _legacy_numbers(file, start, storage, where)
        raise CheckpointError(f"{where} has no storage {storage.key}")

    return content, read


def _legacy_places(
    content: Any, keys: list[str], data: int, where: str
) -> Iterator[tuple[StorageRef, int]]:
    """Each storage and where it starts; their sizes are those the pickle gives."""
    refs = {record.storage.key: record.storage for record in tensor_records(content)}
    for key in keys:
        if key not in refs:
            raise CheckpointError(f"{where} lists a storage {shown(key)} that no tensor uses")
        yield refs[key], data
        data += _COUNT + _size(refs[key])


def _legacy_numbers(file: IO[bytes], start: int, storage: StorageRef, where: str) -> bytearray:
    end = file.seek(0, 2)
    size = _size(storage)
    file.seek(min(start, end))
    count = int.from_bytes(file.read(_COUNT), "little")
    if start + _COUNT + size > end or count != storage.numel:
        raise CheckpointError(
            f"{where} is cut off or damaged: storage {storage.key} should have {storage.numel} "
            "numbers. Delete the file and download or copy it again"
        )
    return bytearray(file.read(size))


def tensor_records(content: Any) -> Iterator[TensorRecord]:
    """The tensors in a mapping of mappings (two levels, as checkpoints have)."""
    if isinstance(content, TensorRecord):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            if isinstance(value, TensorRecord):
                yield value
            elif isinstance(value, dict):
                yield from (inner for inner in value.values() if isinstance(inner, TensorRecord))


def _size(storage: StorageRef) -> int:
    return storage.numel * storage.dtype.itemsize


def _tensor(record: TensorRecord, read: ReadStorage, where: str) -> Tensor:
    """A record's tensor; its view must stay inside its storage and show nothing twice."""
    storage, offset, shape, strides = record
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=False))
    if len(shape) != len(strides) or count > storage.numel or (count and last >= storage.numel):
        raise CheckpointError(
            f"{where}: a tensor of shape {shape} and strides {strides} from {offset} on does not "
            f"fit its storage of {storage.numel} numbers"
        )
    if not count:
        return torch.empty(shape, dtype=storage.dtype)
    flat = torch.frombuffer(read(storage), dtype=storage.dtype)
    return flat.as_strided(shape, strides, offset)

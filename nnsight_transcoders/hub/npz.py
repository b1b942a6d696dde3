"""numpy's ``.npz`` files without numpy: floating-point arrays only, no objects, no pickles.

An ``.npz`` is a zip of ``.npy`` files, each a short text header and the numbers. The header says
the shape and the type; it is checked against the size of its entry before any number is read.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.archives import Archive, open_archive
from nnsight_transcoders.hub.tensors import TensorInfo

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 4096
_DTYPES = {
    "<f2": ("F16", torch.float16),
    "<f4": ("F32", torch.float32),
    "<f8": ("F64", torch.float64),
}


@dataclass(frozen=True)
class _Array:
    entry: str
    shape: tuple[int, ...]
    dtype: str
    by_columns: bool
    start: int


def read_npz_header(file: IO[bytes], where: str) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the arrays; no number is read.

    Raises:
        CheckpointError: Not an npz, one that is damaged or a zip bomb, or other than floats in it.
    """
    with open_archive(file, where) as archive:
        arrays = _arrays(archive, where)
    return {name: TensorInfo(a.shape, _DTYPES[a.dtype][0]) for name, a in arrays.items()}


def read_npz(file: IO[bytes], where: str, transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """All arrays as tensors.

    Args:
        file: A seekable file.
        where: What to call it in messages.
        transposed: Matrices to hand out the other way round. They are read first, so that both
            ways are in memory while there is little else.

    Raises:
        CheckpointError: As for ``read_npz_header``, or an array that is not all there.
    """
    found: dict[str, Tensor] = {}
    with open_archive(file, where) as archive:
        arrays = _arrays(archive, where)
        for name in sorted(arrays, key=lambda name: (name not in transposed, name)):
            if name in transposed:
                found[name] = _tensor(archive.read(arrays[name].entry), arrays[name]).T.contiguous()
            else:
                found[name] = _tensor(archive.read(arrays[name].entry), arrays[name])
    return found


def _arrays(archive: Archive, where: str) -> dict[str, _Array]:
    found = {}
    for entry, info in archive.entries.items():
        if not entry.endswith(".npy"):
            raise CheckpointError(f"{where}: entry {entry} is no array")
        name = entry.removesuffix(".npy")
        array = _parse(archive.head(entry, _MAX_HEADER), entry, where)
        size = array.start + math.prod(array.shape) * _DTYPES[array.dtype][1].itemsize
        if size != info.file_size:
            raise CheckpointError(
                f"{where}: array {name} says shape {array.shape}, which is {size} bytes, but it "
                f"has {info.file_size}"
            )
        found[name] = array
    return found


def _parse(head: bytes, entry: str, where: str) -> _Array:
    """The header of a ``.npy``: magic, version, length, a Python literal."""
    wide = head[6:7] in (b"\x02", b"\x03")
    length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
    start = (12 if wide else 10) + length
    if not head.startswith(_MAGIC) or start > len(head):
        raise CheckpointError(f"{where}: entry {entry} is not a numpy array, or its header is cut")
    try:
        said = ast.literal_eval(head[12 if wide else 10 : start].decode("latin-1").strip())
        shape, dtype, by_columns = said["shape"], said["descr"], said["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{where}: entry {entry} has no numpy header ({error})") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{where}: array {entry} has type {dtype!r}, expected one of {', '.join(_DTYPES)}"
            + ("; arrays of Python objects are never read" if dtype == "|O" else "")
        )
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where}: array {entry} has shape {shape!r}")
    return _Array(entry, shape, dtype, bool(by_columns), start)


def _tensor(data: bytearray, array: _Array) -> Tensor:
    dtype = _DTYPES[array.dtype][1]
    if not math.prod(array.shape):
        return torch.empty(array.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, offset=array.start)
    if array.by_columns:
        return flat.reshape(array.shape[::-1]).permute(*reversed(range(len(array.shape))))
    return flat.reshape(array.shape)

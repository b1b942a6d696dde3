"""Files as ``torch.save`` writes them, with objects of classes that are not installed here.

A pickler refuses an object whose class it cannot import, so the few instructions that plain data,
tensors and such objects take are written here (pickle protocol 2, inside torch's zip layout).
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
}


@dataclass(frozen=True)
class Instance:
    """An object of a class that is named only, with its attributes.

    Attributes:
        module: Where the class is.
        name: Its name.
        state: Its attributes.
    """

    module: str
    name: str
    state: Mapping[str, Any]


@dataclass(frozen=True)
class New:
    """A tuple of a class that is named only (a named tuple).

    Attributes:
        module: Where the class is.
        name: Its name.
        arguments: What it is made of.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]


def write_torch_file(content: Any, path: Path) -> None:
    """Write text, numbers, None, lists, tuples, mappings, tensors, ``Instance`` and ``New``."""
    writer = _Writer()
    data = writer.written(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _put(archive, "data.pkl", data)
        _put(archive, "byteorder", b"little")
        for key, tensor in enumerate(writer.tensors):
            _put(archive, f"data/{key}", _bytes(tensor))
        _put(archive, "version", b"3\n")


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a file without a date: the same content makes the same archive at any time."""
    archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class _Writer:
    """Writes one object as a pickle, and keeps the tensors in it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._out = BytesIO()

    def written(self, content: Any) -> bytes:
        """The pickle."""
        self._put(pickle.PROTO, b"\x02")
        self._value(content)
        self._put(pickle.STOP)
        return self._out.getvalue()

    def _put(self, *parts: bytes) -> None:
        for part in parts:
            self._out.write(part)

    def _value(self, value: Any) -> None:
        if value is None:
            self._put(pickle.NONE)
        elif isinstance(value, bool):
            self._put(pickle.NEWTRUE if value else pickle.NEWFALSE)
        elif isinstance(value, int):
            data = pickle.encode_long(value)
            self._put(pickle.LONG1, bytes([len(data)]), data)
        elif isinstance(value, float):
            self._put(pickle.BINFLOAT, struct.pack(">d", value))
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            self._put(pickle.BINUNICODE, struct.pack("<I", len(data)), data)
        elif isinstance(value, Tensor):
            self._tensor(value)
        else:
            self._compound(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, Instance):
            self._global(value.module, value.name)
            self._put(pickle.EMPTY_TUPLE, pickle.NEWOBJ)
            self._value(dict(value.state))
            self._put(pickle.BUILD)
        elif isinstance(value, New):
            self._global(value.module, value.name)
            self._value(value.arguments)
            self._put(pickle.NEWOBJ)
        elif isinstance(value, tuple):
            self._put(pickle.MARK)
            for one in value:
                self._value(one)
            self._put(pickle.TUPLE)
        elif isinstance(value, list):
            self._put(pickle.EMPTY_LIST, pickle.MARK)
            for one in value:
                self._value(one)
            self._put(pickle.APPENDS)
        elif isinstance(value, dict):
            self._put(pickle.EMPTY_DICT, pickle.MARK)
            for key, one in value.items():
                self._value(key)
                self._value(one)
            self._put(pickle.SETITEMS)
        else:
            raise TypeError(f"a {type(value).__name__} cannot be written")

    def _global(self, module: str, name: str) -> None:
        self._put(pickle.GLOBAL, f"{module}\n{name}\n".encode())

    def _tensor(self, tensor: Tensor) -> None:
        """``_rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())``."""
        tensor = tensor.contiguous()
        self._global("torch._utils", "_rebuild_tensor_v2")
        self._put(pickle.MARK, pickle.MARK)
        self._value("storage")
        self._global("torch", _STORAGES[tensor.dtype])
        for one in (str(len(self.tensors)), "cpu", tensor.numel()):
            self._value(one)
        self._put(pickle.TUPLE, pickle.BINPERSID)
        for one in (0, tuple(tensor.shape), tuple(tensor.stride()), False):
            self._value(one)
        self._global("collections", "OrderedDict")
        self._put(pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.TUPLE, pickle.REDUCE)
        self.tensors.append(tensor)

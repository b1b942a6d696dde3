"""npz files: what they claim is checked before it is believed."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import archives
from nnsight_transcoders.hub.npz import read_npz, read_npz_header


def npy(shape: Any, descr: Any = "<f4", data: bytes = b"", order: bool = False) -> bytes:
    """A ``.npy`` by hand."""
    header = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(method: int = zipfile.ZIP_STORED, **entries: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return file


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_numpy_writes(save: Any, dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
    arrays = {
        "rows": values,
        "columns": np.asfortranarray(values),
        "vector": values[0],
        "one": values[0, 0],
        "none": values[:0],
    }
    save(tmp_path / "a.npz", **arrays)
    with (tmp_path / "a.npz").open("rb") as file:
        header = read_npz_header(file, "f")
        tensors = read_npz(file, "f")
    for name, array in arrays.items():
        assert torch.equal(tensors[name], torch.from_numpy(np.array(array)))
        assert header[name].shape == array.shape
        assert header[name].torch_name == str(np.dtype(dtype))


def test_objects_are_never_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(marker), "w")

    np.savez(tmp_path / "a.npz", W_enc=np.array([Trap()], dtype=object))
    with (tmp_path / "a.npz").open("rb") as file:
        with pytest.raises(CheckpointError, match="arrays of Python objects are never read"):
            read_npz(file, "f")
    for descr in ("|O", "O", [("a", "|O")], ("<f4", (2,)), "<i8", "<c8", "|V4", ">f4", None):
        with pytest.raises(CheckpointError, match="has type"):
            read_npz(npz(a=npy((1,), descr, pickle.dumps(1))), "f")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (npy((4,), data=b"\0" * 12), "is 144 bytes, but it has 140"),
        (npy((1 << 40, 1 << 20)), "says shape"),
        (npy((-4,), data=b"\0" * 16), "has shape"),
        (npy((2.0,), data=b"\0" * 8), "has shape"),
        (npy((True,), data=b"\0" * 4), "has shape"),
        (npy([1], data=b"\0" * 4), "has shape"),
        (npy(1, data=b"\0" * 4), "has shape"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 9000, "header is cut"),
        (b"\x93NUMPY\x01\x00\x08\x00{'a': 1}", "no numpy header"),
        (b"\x93NUMPY\x01\x00\x10\x00__import__('os')", "no numpy header"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 4000) + b"(" * 4000, "no numpy header"),
        (b"\x93NUMPY", "not a numpy array"),
        (b"", "not a numpy array"),
        (pickle.dumps([1]), "not a numpy array"),
    ],
)
def test_headers_that_are_wrong(entry: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_npz(npz(a=entry), "f")


def test_bombs() -> None:
    zeros = npy((1 << 23,), data=bytes(4 << 23))
    with pytest.raises(CheckpointError, match="refused as a zip bomb"):
        read_npz_header(npz(zipfile.ZIP_DEFLATED, a=zeros), "f")
    # The same, with the claim in the zip's list of contents made small: found when it is read.
    data = bytearray(npz(zipfile.ZIP_DEFLATED, a=zeros).getvalue())
    for signature, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = data.index(signature) + at
        data[start : start + 4] = struct.pack("<I", 128 + 400)
    with pytest.raises(CheckpointError, match="says shape|Bad CRC"):
        read_npz(io.BytesIO(data), "f")
    small = bytearray(npz(zipfile.ZIP_DEFLATED, a=npy((100,), data=bytes(400_000))).getvalue())
    for signature, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = small.index(signature) + at
        small[start : start + 4] = struct.pack("<I", 128 + 400)
    with pytest.raises(CheckpointError, match="does not have the 528 bytes|not a complete zip"):
        read_npz(io.BytesIO(small), "f")
    # An archive of many entries over the same bytes claims more than the file has.
    with pytest.raises(CheckpointError, match="more than|no array"):
        read_npz(npz(**{f"n{i}": b"" for i in range(archives.MAX_ENTRIES + 1)}), "f")


def test_archives_that_are_wrong() -> None:
    good = npz(a=npy((2,), data=bytes(8)), b=npy((2,), data=bytes(8))).getvalue()
    for keep in range(0, len(good), 37):
        with pytest.raises(CheckpointError, match="not a complete zip archive"):
            read_npz(io.BytesIO(good[:keep]), "f")
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", npy((0,)))
        archive.writestr("a.npy", npy((0,)))
    with pytest.raises(CheckpointError, match="of the same name"):
        read_npz(twice, "f")
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("../../evil.txt", b"")
    with pytest.raises(CheckpointError, match="is no array"):
        read_npz(other, "f")
    packed = npz(zipfile.ZIP_BZIP2, a=npy((2,), data=bytes(8)))
    with pytest.raises(CheckpointError, match="compressed in a way"):
        read_npz(packed, "f")
    flipped = bytearray(good)
    flipped[good.index(b"a.npy") + 5 + 130] ^= 1
    with pytest.raises(CheckpointError, match="Bad CRC"):
        read_npz(io.BytesIO(flipped), "f")

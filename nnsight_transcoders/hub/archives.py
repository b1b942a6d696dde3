"""Reading zip files that somebody else wrote: npz and torch files, with their claims checked first.

A zip says how large each entry will be once unpacked; a bomb says something enormous, or lies. So
the claims are checked against the file before anything is unpacked, no more than what was claimed
is ever read, and an entry that holds more or less than it claims is an error. Names of entries are
only compared, never used as paths.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from nnsight_transcoders.errors import CheckpointError

MAX_ENTRIES = 4096
#: An archive may unpack to so many times its size: weights hardly compress, bombs do by 1000.
MAX_RATIO = 64
#: Below this many bytes the ratio says nothing (a small archive of zeros).
SMALL = 1 << 24

_CHUNK = 1 << 20
_ENCRYPTED = 0x1
_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,  # a compression or version that zipfile does not have
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
    OSError,
)


class Archive:
    """The entries of a zip file, read with bounds. Made by ``open_archive``.

    Attributes:
        entries: Name -> what the archive says about it.
    """

    def __init__(self, archive: zipfile.ZipFile, where: str) -> None:
        self._zip, self._where = archive, where
        self.entries = {info.filename: info for info in archive.infolist()}

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of an entry, fewer if it is shorter."""
        with _archive_errors(self._where), self._zip.open(self.entries[name]) as stream:
            return stream.read(size)

    def read(self, name: str) -> bytearray:
        """A whole entry.

        Raises:
            CheckpointError: It holds more or less than the archive claims, or is damaged.
        """
        info = self.entries[name]
        data, filled = bytearray(info.file_size), 0
        with _archive_errors(self._where), self._zip.open(info) as stream:
            while filled < len(data):
                piece = stream.read(min(_CHUNK, len(data) - filled))
                if not piece:
                    break
                data[filled : filled + len(piece)] = piece
                filled += len(piece)
            more = stream.read(1)  # also makes zipfile check the sum
        if filled != info.file_size or more:
            raise CheckpointError(
                f"{self._where}: entry {name} does not have the {info.file_size} bytes it claims; "
                "the file is damaged or made to mislead"
            )
        return data


@contextmanager
def open_archive(file: IO[bytes], where: str, *, stored: bool = False) -> Iterator[Archive]:
    """Open a zip and check its claims.

    Args:
        file: A seekable file.
        where: What to call it in messages.
        stored: Refuse compressed entries (torch never writes any).

    Raises:
        CheckpointError: Not a complete zip file, or one that claims more than it can hold.
    """
    with _archive_errors(where):
        size = file.seek(0, 2)
        file.seek(0)
        archive = zipfile.ZipFile(file)
    with archive:
        _check(archive.infolist(), size, where, stored)
        yield Archive(archive, where)


def _check(entries: list[zipfile.ZipInfo], size: int, where: str, stored: bool) -> None:
    if len(entries) > MAX_ENTRIES or len({info.filename for info in entries}) != len(entries):
        raise CheckpointError(
            f"{where} has {len(entries)} entries, some of the same name or more than {MAX_ENTRIES}"
        )
    allowed = (zipfile.ZIP_STORED,) if stored else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for info in entries:
        if info.compress_type not in allowed or info.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{where}: entry {info.filename} is encrypted or compressed in a way that is not "
                "read here"
            )
        if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            raise CheckpointError(f"{where}: entry {info.filename} gives two sizes for itself")
    packed = sum(info.compress_size for info in entries)
    unpacked = sum(info.file_size for info in entries)
    if packed > size or unpacked > max(MAX_RATIO * size, SMALL):
        raise CheckpointError(
            f"{where} has {size} bytes and claims to hold {unpacked}: it is refused as a zip bomb"
        )


@contextmanager
def _archive_errors(where: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise CheckpointError(
            f"{where} is not a complete zip archive ({error}); it may be cut off or damaged, so "
            "delete it and download or copy it again"
        ) from error

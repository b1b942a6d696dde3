"""A file on the Hub as a seekable stream, or any part of it, read with range requests.

A zip has its list of contents at its end, and each entry starts with what it is: a few small
requests tell shapes and types of a file of hundreds of megabytes.
"""

from __future__ import annotations

import io
from typing import IO, Any, cast

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.hub_errors import hub_errors

#: Bytes asked for at once.
BLOCK = 1 << 16
_TIMEOUT = 30.0


def open_remote(api: HfApi, repo_id: str, name: str, commit: str) -> IO[bytes]:
    """A file of a repository at a commit, as a stream.

    Raises:
        CheckpointError: The Hub does not give it.
    """
    reader = _RangeReader(*file_address(api, repo_id, name, commit))
    return cast("IO[bytes]", io.BufferedReader(reader, BLOCK))


def file_address(
    api: HfApi, repo_id: str, name: str, commit: str
) -> tuple[str, str, dict[str, str]]:
    """Repository, URL and headers of a file, as ``ask_range`` takes them."""
    url = hf_hub_url(repo_id, name, revision=commit, endpoint=api.endpoint)
    return repo_id, url, build_hf_headers(token=api.token, library_name=api.library_name)


def ask_range(
    repo_id: str, url: str, headers: dict[str, str], start: int, stop: int
) -> tuple[bytes, int]:
    """Some bytes of a file, and the size of the whole. Of a range that reaches behind the file's
    end, what there is.

    Raises:
        CheckpointError: The Hub does not give them.
    """
    with hub_errors(repo_id):
        asked = {**headers, "range": f"bytes={start}-{stop - 1}"}
        response = get_session().get(url, headers=asked, timeout=_TIMEOUT)
        hf_raise_for_status(response)
    size = response.headers.get("content-range", "").rpartition("/")[2]
    if response.status_code != 206 or not size.isdecimal():
        raise CheckpointError(
            f"{repo_id}: the server does not send parts of files. Next: download the repository "
            "and open the folder"
        )
    if len(response.content) != min(stop, int(size)) - start:
        raise CheckpointError(
            f"{repo_id}: the server sent {len(response.content)} bytes for {start} to {stop} of "
            f"{int(size)}. Next: try again"
        )
    return response.content, int(size)


class _RangeReader(io.RawIOBase):
    """Asks for one block at a time; the first answer tells the size."""

    def __init__(self, repo_id: str, url: str, headers: dict[str, str]) -> None:
        self._address = repo_id, url, headers
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        _, self._size = ask_range(*self._address, 0, 1)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (0, self._position, self._size)[whence]
        if origin + offset < 0:
            raise ValueError(f"negative position {origin + offset}")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size or not len(buffer):
            return 0
        number, inside = divmod(self._position, BLOCK)
        if number not in self._blocks:
            start = number * BLOCK
            self._blocks[number], _ = ask_range(
                *self._address, start, min(start + BLOCK, self._size)
            )
        piece = self._blocks[number][inside : inside + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

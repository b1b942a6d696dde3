"""A file on the Hub as a seekable stream, read with range requests.

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
    url = hf_hub_url(repo_id, name, revision=commit, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token, library_name=api.library_name)
    return cast("IO[bytes]", io.BufferedReader(_RangeReader(repo_id, url, headers), BLOCK))


class _RangeReader(io.RawIOBase):
    """Asks for one block at a time; the first answer tells the size."""

    def __init__(self, repo_id: str, url: str, headers: dict[str, str]) -> None:
        self._repo_id, self._url, self._headers = repo_id, url, headers
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        _, self._size = self._ask(0, 1)

    def _ask(self, start: int, stop: int) -> tuple[bytes, int]:
        headers = {**self._headers, "range": f"bytes={start}-{stop - 1}"}
        with hub_errors(self._repo_id):
            response = get_session().get(self._url, headers=headers, timeout=_TIMEOUT)
            hf_raise_for_status(response)
        size = response.headers.get("content-range", "").rpartition("/")[2]
        if response.status_code != 206 or not size.isdecimal():
            raise CheckpointError(
                f"{self._repo_id}: the server does not send parts of files. Next: download the "
                "repository and open the folder"
            )
        return response.content, int(size)

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
            self._blocks[number], _ = self._ask(start, min(start + BLOCK, self._size))
        piece = self._blocks[number][inside : inside + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

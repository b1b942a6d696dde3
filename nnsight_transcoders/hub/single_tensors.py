"""Single tensors of a safetensors file on the Hub, by range requests.

A model's checkpoint is shards of gigabytes, of which a graph needs the value, output and
unembedding weights. A file's header says at which bytes a tensor lies; those are asked for, and
kept as a small file of their own in the Hub's assets cache, so that they are read once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.hub.hub_errors import is_unreachable
from nnsight_transcoders.hub.remote_file import ask_range, file_address
from nnsight_transcoders.hub.staging import write_tensors
from nnsight_transcoders.hub.tensors import FLOAT_DTYPES, open_tensors

logger = logging.getLogger(__name__)

#: Bytes of a tensor that are asked for at once.
PIECE = 32 * 2**20
#: Bytes of a file that are asked for first: most headers are shorter.
FIRST = 2**17
#: The format's own bound on headers.
LARGEST_HEADER = 100 * 10**6
#: Seconds to wait before a piece that did not arrive is asked for again.
PAUSES = (0.2, 1.0, 5.0)
_KEY = "tensor"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        start: Its first byte in the file.
        stop: The byte behind its last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SingleTensors:
    """The tensors of one safetensors file at one commit, each read when it is asked for.

    Args:
        api: The Hub's client.
        repo_id: The repository.
        name: The file.
        commit: The commit.
        folder: Where tensors are kept; None: nowhere.

    Raises:
        CheckpointError: The Hub does not give it, or it is no safetensors file.
    """

    def __init__(
        self, api: HfApi, repo_id: str, name: str, commit: str, folder: Path | None
    ) -> None:
        self._address = file_address(api, repo_id, name, commit)
        self._where, self._name, self._folder = f"{name} of {repo_id}", name, folder
        self._header, self._data_start = self._read_header()

    def __getitem__(self, key: str) -> Tensor:
        place, kept = self._place(key), self._kept(key)
        if kept is not None and kept.is_file():
            try:
                with open_tensors(kept) as handle:
                    return handle.get_tensor(_KEY)
            except CheckpointError as error:
                logger.info("asking again for a kept tensor that is damaged: %s", error)
        tensor = self._read(place)
        if kept is not None:
            try:
                write_tensors(kept, {_KEY: tensor}, {"file": self._name, "tensor": key})
            except (InputError, OSError) as error:
                logger.info("%s of %s is not kept: %s", key, self._where, error)
        return tensor

    def _kept(self, key: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{self._name}/{key}".encode()).hexdigest()[:24]
        return self._folder / f"{digest}@tensor.safetensors"

    def _read(self, place: Place) -> Tensor:
        buffer = bytearray(place.stop - place.start)
        for start in range(place.start, place.stop, PIECE):
            stop = min(start + PIECE, place.stop)
            at = start - place.start
            buffer[at : at + stop - start] = self._piece(start, stop)
        if not buffer:
            return torch.zeros(place.shape, dtype=place.dtype)
        return torch.frombuffer(buffer, dtype=place.dtype).view(place.shape)

    def _piece(self, start: int, stop: int) -> bytes:
        for pause in PAUSES:
            try:
                return ask_range(*self._address, start, stop)[0]
            except CheckpointError as error:
                cause = error.__cause__
                if isinstance(cause, Exception) and not is_unreachable(cause):
                    raise
                logger.info("asking again for bytes %d to %d: %s", start, stop, error)
                time.sleep(pause)
        return ask_range(*self._address, start, stop)[0]

    def _read_header(self) -> tuple[dict[str, Any], int]:
        first, size = ask_range(*self._address, 0, FIRST)
        length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
        if not 0 < length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{self._where} is no safetensors file: it has no header")
        text = first[8 : 8 + length]
        if len(text) < length:
            text += self._piece(8 + len(text), 8 + length)
        try:
            header = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{self._where} is no safetensors file: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self._where} is no safetensors file: its header is no object")
        self._size = size
        return header, 8 + length

    def _place(self, key: str) -> Place:
        found = self._header.get(key)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._where} has no tensor {key}")
        dtype = found.get("dtype")
        shape, ends = _counts(found.get("shape")), _counts(found.get("data_offsets"))
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self._where}: tensor {key} has dtype {dtype}, expected one of "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        if shape is None or ends is None or len(ends) != 2:
            raise CheckpointError(f"{self._where}: the header's entry of {key} cannot be read")
        start, stop = (self._data_start + end for end in ends)
        wanted = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
        if stop - start != wanted or stop > self._size:
            raise CheckpointError(
                f"{self._where}: tensor {key} of shape {tuple(shape)} should take {wanted} bytes, "
                f"but lies at bytes {start} to {stop} of {self._size}"
            )
        return Place(FLOAT_DTYPES[dtype], tuple(shape), start, stop)


def _counts(value: Any) -> list[int] | None:
    """A list of numbers that are not negative; None if it is something else."""
    fits = isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
    return value if fits else None

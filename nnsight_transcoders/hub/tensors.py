"""Reading safetensors files: headers, whole tensors, single rows.

Files are memory-mapped, so a tensor that is opened but not used costs nothing, and reading rows
touches only the pages those rows lie on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError

#: The dtypes weights may be stored in; the header's names for them.
FLOAT_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about one tensor: its shape and the format's name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_name(self) -> str:
        """``"BF16"`` -> ``"bfloat16"``; the header's own name where it is no float dtype."""
        dtype = FLOAT_DTYPES.get(self.dtype)
        return self.dtype if dtype is None else str(dtype).removeprefix("torch.")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """``safe_open`` on the CPU, with damage reported as a ``CheckpointError``."""
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {_diagnosis(path, error)}") from error
    with handle as opened:
        yield opened


def _diagnosis(path: Path, error: Exception) -> str:
    if not path.is_file():
        return "there is no such file"
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return "it is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    return (
        f"it is not a complete safetensors file ({error}); it may be cut off or damaged, so delete "
        "it and download or copy it again"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a file's tensors; no weight is read."""
    with open_tensors(path) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }


def runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted, distinct indices as half-open runs: ``[3, 4, 9]`` -> ``[(3, 5), (9, 10)]``."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and index == found[-1][1]:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def read_rows(path: Path, key: str, indices: Tensor, *, transposed: bool = False) -> Tensor:
    """Rows of one tensor, in the order asked for, without reading the rest of it.

    Each row is read once and neighbouring rows together.

    Args:
        path: The file.
        key: The tensor's name in it.
        indices: ``(n,)``, in any order, repeats allowed.
        transposed: The file holds one feature per *column* of a matrix; its columns are returned
            as rows. Every stored row holds a piece of each column, so nearly all pages of the
            tensor are read, though only the columns asked for are kept.
    """
    wanted, order = torch.unique(indices, return_inverse=True)
    with open_tensors(path) as handle:
        stored = handle.get_slice(key)
        if transposed:
            parts = [stored[:, start:stop].T for start, stop in runs(wanted.tolist())]
        else:
            parts = [stored[start:stop] for start, stop in runs(wanted.tolist())]
        if not parts:
            return stored[:, 0:0].T.clone() if transposed else stored[0:0].clone()
        return torch.cat(parts)[order]

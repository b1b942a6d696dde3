"""Writing a folder of files so that a failed save leaves what was there before as it was."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import ConfigError, InputError
from nnsight_transcoders.transcoder import FeatureEncoder


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder inside ``folder`` whose files move up when the block ends well.

    Everything is written before the first file moves, so running out of space or an error in the
    block changes nothing. It needs room for the old and the new files at once.

    Args:
        folder: Where the files go; made if it is not there.
        last: The file that moves last: the config, which makes the others a checkpoint.

    Raises:
        InputError: The folder cannot be made or written.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield stage
        for path in sorted(stage.iterdir(), key=lambda path: (path.name == last, path.name)):
            path.replace(folder / path.name)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if created:
            with suppress(OSError):  # not empty: the save went well
                folder.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file.

    Raises:
        InputError: It cannot be written.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        tied = any(tensor.data_ptr() == other.data_ptr() for other in own.values())
        own[name] = tensor.clone() if tied else tensor  # the format has no tied tensors
    try:
        with atomic_path(path) as partial:  # which also gives the file an ordinary file's mode
            save_file(own, partial, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        ConfigError: A value that JSON does not have.
    """
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


def canonical_tensors(module: FeatureEncoder) -> dict[str, Tensor]:
    """A module's weights under their names in files: the threshold loses its prefix."""
    return {
        name.removeprefix("activation."): tensor for name, tensor in module.state_dict().items()
    }

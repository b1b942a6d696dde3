"""The file of ``nnsight-transcoders train``: a run's config, and what it is run on.

YAML or JSON, one flat mapping: ``TrainConfig``'s fields and those of ``RunFile`` side by side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nnsight_transcoders.errors import ConfigError, InputError

from .config import TrainConfig, unknown_key

_EXPONENT = re.compile(r"[+-]?\d+(?:\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class RunFile:
    """What a run's file says.

    Attributes:
        config: The training's own settings.
        model: Hub id or folder of the model, or ``builtin``.
        data: ``builtin``, a text file, a folder of them, or the arguments of
            ``datasets.load_dataset`` (``{path: ..., split: train}``; streamed unless it says not).
        out: The run's folder.
        start: A transcoder set to train further: Hub id, folder or builtin name.
        device: Where the model runs.
        model_dtype: The model's dtype.
        remote: Run the model on a server: true, or its address.
    """

    config: TrainConfig
    model: str
    data: str | Mapping[str, Any]
    out: str
    start: str | None = None
    device: str = "cpu"
    model_dtype: str = "float32"
    remote: bool | str = False

    def open_data(self) -> Any:
        """The data as ``train`` takes them.

        Raises:
            ConfigError: ``datasets`` is not installed.
            InputError: There is no such data set.
        """
        if isinstance(self.data, str):
            return self.data
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ConfigError(
                "data sets need the package datasets: pip install 'nnsight-transcoders[train]'"
            ) from error
        options = {"split": "train", "streaming": True, **self.data}
        try:
            return load_dataset(**options)
        except (TypeError, ValueError, OSError) as error:
            raise InputError(f"cannot open the data set {dict(self.data)}: {error}") from error


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run's file.

    Args:
        path: YAML or JSON.
        overrides: ``key=value`` each, over what the file says; ``a.b=value`` inside a mapping.

    Raises:
        ConfigError: Not a mapping, an unknown or missing key, a bad value.
        InputError: The file cannot be read.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values such as 'k: 32', got {data!r:.60}")
    for override in overrides:
        _override(data, override)
    return _run_file({key: _numbers(value) for key, value in data.items()}, path)


def _run_file(data: dict[str, Any], path: Path) -> RunFile:
    own = [f.name for f in fields(RunFile) if f.name != "config"]
    training = [f.name for f in fields(TrainConfig)]
    for key in data:
        if key not in (*own, *training):
            raise ConfigError(f"{path}: {unknown_key(key, [*own, *training])}")
    missing = [key for key in ("model", "data", "out") if not data.get(key)]
    if missing:
        raise ConfigError(f"{path} must say {', '.join(missing)}")
    kinds = {"remote": (bool, str), "data": (str, Mapping)}
    for key in own:
        if data.get(key) is not None and not isinstance(data[key], kinds.get(key, str)):
            raise ConfigError(f"{path}: {key} cannot be {data[key]!r}")
    config = TrainConfig.from_dict({k: v for k, v in data.items() if k in training})
    return RunFile(config, **{k: v for k, v in data.items() if k in own})


def _override(data: dict[str, Any], text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(f"settings are given as key=value, got {text!r}")
    *outer, last = name.split(".")
    place = data
    for key in outer:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{text!r}: {key} is no mapping")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not a YAML value: {error}") from error


def _numbers(value: Any) -> Any:
    """``1e-3`` and ``1e6`` as numbers, which YAML 1.1 takes for text."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value

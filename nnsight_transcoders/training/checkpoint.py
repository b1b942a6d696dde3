"""Checkpoints that are there or not there, whenever the process is killed.

A checkpoint is a folder ``checkpoint/step_00001000``: per process a safetensors file (weights,
optimiser, counters) and a JSON file (step, position in the data, settings). It is written under
another name and renamed when complete; only then are older ones removed. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.hub.staging import write_json, write_tensors

from .config import FREE_KEYS, TrainConfig
from .processes import Processes

_NAME = re.compile(r"step_(\d{8,})")
RUN = "training.json"


@dataclass(frozen=True)
class Checkpoint:
    """What one process needs to go on.

    Attributes:
        step: Steps done.
        tensors: Weights, counters and the optimisers' states, by name.
        data: Everything else, JSON-ready.
    """

    step: int
    tensors: dict[str, Tensor]
    data: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        out: The run's folder.
        processes: Each writes its own files.
    """

    def __init__(self, out: Path, processes: Processes) -> None:
        self._out, self._folder, self._processes = out, out / "checkpoint", processes

    def claim(self, config: TrainConfig, model: str) -> None:
        """Make the folder this run's, or find that it already is.

        Raises:
            ConfigError: It belongs to a run with other settings.
            InputError: It cannot be written, or holds something else.
        """
        settings = {"model": model, "processes": self._processes.world, **config.to_dict()}
        path = self._out / RUN
        if path.exists():
            _check_same(path, settings)
            if self._processes.is_main:
                self._clear_leftovers()
        elif self._processes.is_main:
            if (self._out / "config.json").exists():
                raise InputError(
                    f"{self._out} holds a checkpoint that was not trained here: choose another "
                    "folder"
                )
            with atomic_path(path) as partial:
                write_json(partial, settings)
        self._processes.wait()

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self._steps()
        return self._folder / f"step_{max(found):08d}" if found else None

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        return [int(match[1]) for match in matches if match]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and remove older ones. All processes call it.

        Raises:
            InputError: It cannot be written (a full disk, say); older ones are as they were.
        """
        final = self._folder / f"step_{checkpoint.step:08d}"
        partial = self._folder / f".step_{checkpoint.step:08d}.part"
        failed: Exception | None = None
        try:
            if self._processes.is_main:
                self._clear_partial()
            self._processes.wait()
            self._write(partial, checkpoint)
        except (OSError, InputError) as error:
            failed = error
        complete = self._processes.everywhere(failed is None)
        if not complete:
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"the checkpoint of step {checkpoint.step} could not be written: "
                f"{failed or 'another process failed'}. Training stopped; earlier checkpoints in "
                f"{self._folder} are intact: make room and run it again to go on from there"
            ) from failed
        if self._processes.is_main:
            if final.exists():  # written before the end of a run that was done again
                shutil.rmtree(partial)
            else:
                partial.replace(final)
            self._remove_older(checkpoint.step)
        self._processes.wait()

    def _write(self, partial: Path, checkpoint: Checkpoint) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        rank = self._processes.rank
        write_tensors(partial / f"rank_{rank}.safetensors", checkpoint.tensors, {})
        write_json(partial / f"rank_{rank}.json", {"step": checkpoint.step, **checkpoint.data})
        for path in partial.glob(f"rank_{rank}.*"):  # on the disk before the folder gets its name
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _clear_leftovers(self) -> None:
        """What a process that was killed while it saved had no time to remove."""
        self._clear_partial()
        self._remove_older(max(self._steps(), default=0))

    def _clear_partial(self) -> None:
        for path in self._folder.glob(".step_*.part"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_older(self, step: int) -> None:
        for other in self._steps():
            if other < step:
                shutil.rmtree(self._folder / f"step_{other:08d}", ignore_errors=True)

    def load(self, folder: Path) -> Checkpoint:
        """This process' part of a checkpoint.

        Raises:
            CheckpointError: It is damaged.
        """
        rank = self._processes.rank
        try:
            data = json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            with safe_open(folder / f"rank_{rank}.safetensors", "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} is damaged ({error}): delete it, and training goes on from the start"
            ) from error
        return Checkpoint(data.pop("step"), tensors, data)


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): choose another folder") from error
    keys = [key for key in {**earlier, **settings} if key not in FREE_KEYS]
    changed = [
        f"{key} ({earlier.get(key)!r} there, {settings.get(key)!r} now)"
        for key in keys
        if earlier.get(key) != json.loads(json.dumps(settings.get(key)))
    ]
    if changed:
        raise ConfigError(
            f"{path.parent} belongs to a run with other settings: {'; '.join(changed)}. Give the "
            "same settings to go on with it, or another folder"
        )


# -- optimisers ----------------------------------------------------------------------------------


def pack_optimizer(optimizer: torch.optim.Optimizer, name: str) -> tuple[dict[str, Tensor], Any]:
    """An optimiser's state as named tensors and the rest."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{index}.{key}"] = value
            else:
                rest[f"{index}.{key}"] = value
    return tensors, {"groups": state["param_groups"], "rest": rest}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, name: str, tensors: Mapping[str, Tensor], data: Any
) -> None:
    """The reverse of ``pack_optimizer``."""
    state: dict[int, dict[str, Any]] = {}
    prefix = f"{name}."
    named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for key, value in {**named, **data["rest"]}.items():
        index, _, field = key.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": data["groups"]})

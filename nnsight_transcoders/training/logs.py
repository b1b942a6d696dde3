"""Where a run's numbers go: a progress bar, ``log.jsonl``, and what ``log_to`` names."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import ConfigError, InputError

from .config import TrainConfig

FILE = "log.jsonl"


class Log:
    """The log of one run.

    Args:
        config: Names the services.
        out: The run's folder; None: nothing is written.
        step: Steps done already.
        verbose: Show the progress bar.
        services: Whether this process writes to the services.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path | None,
        step: int,
        verbose: bool,
        services: bool = True,
    ) -> None:
        self._file = None if out is None else out / FILE
        names = config.log_to if services else ()
        self._services = [_service(name, config, out, step) for name in names]
        self._bar = tqdm(
            total=config.steps, initial=step, desc="train", disable=not verbose, leave=True
        )
        self._since, self._positions = time.monotonic(), 0
        if self._file is not None:
            _cut(self._file, step)

    def advance(self, positions: int) -> None:
        """One more step, of so many positions."""
        self._positions += positions
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name.

        Raises:
            InputError: The file cannot be written.
        """
        seconds = time.monotonic() - self._since
        values = {**values, "tokens_per_second": self._positions / max(seconds, 1e-9)}
        self._since, self._positions = time.monotonic(), 0
        shown = {k: f"{v:.3g}" for k, v in values.items() if "/" not in k}
        self._bar.set_postfix(shown)
        for service in self._services:
            service.log(values, step)
        if self._file is not None:
            _append(self._file, {"step": step, **values})

    def close(self) -> None:
        """End the bar and the services."""
        self._bar.close()
        for service in self._services:
            service.finish()


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Training stopped; the last "
            "checkpoint is intact"
        ) from error


def _cut(path: Path, step: int) -> None:
    """Take out the lines of steps that will be done again, and a half-written one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with atomic_path(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


# -- services ------------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(self, out: Path | None, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(_missing("tensorboard")) from error
        self._writer = SummaryWriter(log_dir=str((out or Path()) / "tensorboard"), purge_step=step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class _Tracker:
    """wandb, or trackio, which has the same calls. A resumed run goes on as the same run there."""

    def __init__(self, name: str, config: TrainConfig, out: Path | None, step: int) -> None:
        try:
            module = __import__(name)
        except ImportError as error:
            raise ConfigError(_missing(name)) from error
        self._module = module
        project = "transcoders" if out is None else out.parent.name or "transcoders"
        run = None if out is None else out.name
        resume: dict[str, str] = {"resume": "allow" if step and out is not None else "never"}
        if name == "wandb" and out is not None:  # which knows runs by an id, not by their name
            resume["id"] = _run_id(out, step)
        module.init(project=project, name=run, config=config.to_dict(), **resume)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def finish(self) -> None:
        self._module.finish()


def _run_id(out: Path, step: int) -> str:
    """The run's id, made at its first step and kept in its folder."""
    path = out / "wandb_id.txt"
    if not (step and path.exists()):
        with atomic_path(path) as partial:
            partial.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _service(name: str, config: TrainConfig, out: Path | None, step: int) -> Any:
    return _TensorBoard(out, step) if name == "tensorboard" else _Tracker(name, config, out, step)


def _missing(name: str) -> str:
    extra = "'nnsight-transcoders[train]'" if name == "tensorboard" else name
    return f"log_to={name!r} needs {name}: pip install {extra}, or leave it out of log_to"

"""What is kept of a remote graph while it is under way: in memory, and in a folder if asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import CheckpointError, InputError

_STATE, _RUN = "graph.json", "run.safetensors"


class Kept:
    """Jobs and the first request's answer.

    Attributes:
        jobs: Phase -> the job that it waits for, and which of the job's answers is this graph's.
        packed: The first request's answer.

    Args:
        folder: Where they are written as soon as they are known; None keeps them in memory.
        request: JSON-ready description of the graph. A folder that holds another one is refused.
        host: The server; jobs of another one are of no use.

    Raises:
        InputError: The folder holds another graph.
        CheckpointError: What it holds cannot be read.
    """

    def __init__(
        self, folder: str | Path | None, request: dict[str, Any], host: str | None
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._request, self._host = json.loads(json.dumps(request)), host
        self.jobs: dict[str, tuple[str, int]] = {}
        self.packed: dict[str, Any] | None = None
        if self._folder is not None and (self._folder / _STATE).exists():
            self._read(self._folder)

    def set_job(self, phase: str, job_id: str | None, number: int = 0) -> None:
        """Remember, or forget, the job that a phase waits for."""
        self.jobs.pop(phase, None)
        if job_id is not None:
            self.jobs[phase] = (job_id, number)
        self._write_state()

    def set_run(self, packed: dict[str, Any]) -> None:
        """Remember the first request's answer."""
        self.packed = packed
        if self._folder is not None:
            tensors: dict[str, Tensor] = {}
            tree = _split(packed, "", tensors)
            with atomic_path(self._folder / _RUN) as path:
                save_file(tensors, path, metadata={"tree": json.dumps(tree)})
        self._write_state()

    def _write_state(self) -> None:
        if self._folder is not None:
            # Which part of the edges a job brings is known in this process only.
            jobs = {phase: job for phase, job in self.jobs.items() if phase != "part"}
            state = {"request": self._request, "host": self._host, "jobs": jobs}
            with atomic_path(self._folder / _STATE) as path:
                path.write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _read(self, folder: Path) -> None:
        try:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            kept, jobs = state["request"], state["jobs"]
            jobs = {phase: (str(job), int(number)) for phase, (job, number) in jobs.items()}
            self.jobs = jobs if state["host"] == self._host else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / _STATE} cannot be read: {error}. Delete the folder to start anew"
            ) from error
        if kept != self._request:
            differing = [k for k in self._request if kept.get(k) != self._request[k]]
            raise InputError(
                f"{folder} keeps another graph (it differs in {', '.join(differing)}): give this "
                "one a folder of its own with keep="
            )
        if (folder / _RUN).exists():
            try:
                with safe_open(folder / _RUN, framework="pt") as handle:
                    tree = json.loads(handle.metadata()["tree"])
                    self.packed = _join(tree, handle)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{folder / _RUN} cannot be read: {error}. Delete the folder to start anew"
                ) from error


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested data as JSON, with its tensors taken out under their names."""
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {k: _split(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list):
        return {"list": [_split(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _join(tree: dict[str, Any], handle: Any) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return handle.get_tensor(content)
    if kind == "dict":
        return {k: _join(v, handle) for k, v in content.items()}
    return [_join(v, handle) for v in content] if kind == "list" else content

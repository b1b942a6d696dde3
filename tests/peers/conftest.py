"""Other packages in environments of their own, which ``make test-peers`` builds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("PEERS", HERE.parents[1] / ".venv-peers"))

#: Job name -> (command, folder, inputs).
Jobs = dict[str, tuple[str, Path, torch.Tensor]]
#: Does all jobs in one process of the peer, whose import takes longest; what each computed.
Peer = Callable[[Jobs], dict[str, dict[str, torch.Tensor]]]


def peer(package: str, script: str, folder: Path) -> Peer:
    """A script in the environment of another package."""
    python = ENVIRONMENTS / package / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{package} has no environment in {ENVIRONMENTS}: run `make test-peers`")

    def run(jobs: Jobs) -> dict[str, dict[str, torch.Tensor]]:
        listed = {}
        for name, (command, where, x) in jobs.items():
            files = [folder / f"{name}.{end}.safetensors" for end in ("in", "out")]
            save_file({"x": x}, files[0])
            listed[name] = [command, str(where), *map(str, files)]
        done = subprocess.run(
            [str(python), str(HERE / script)],
            input=json.dumps(list(listed.values())),
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return {name: load_file(job[-1]) for name, job in listed.items()}

    return run


@pytest.fixture(scope="module")
def saelens(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return peer("sae-lens", "peer_saelens.py", tmp_path_factory.mktemp("saelens"))


@pytest.fixture(scope="module")
def circuit_tracer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return peer("circuit-tracer", "peer_circuit_tracer.py", tmp_path_factory.mktemp("tracer"))

"""Two processes on the CPU, started as ``accelerate`` and ``torchrun`` start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import CONFIG
from planted import planted_model, rows

from nnsight_transcoders import TranscoderSet, train
from nnsight_transcoders.errors import ConfigError
from nnsight_transcoders.training.processes import Processes
from nnsight_transcoders.training.run import _check_processes

SCRIPT = """
import sys
import torch
from interrupted_runs import CONFIG
from planted import planted_model, rows
from nnsight_transcoders import train

torch.set_num_threads(1)
model, *_ = planted_model(n_layers=2)
config = CONFIG.replace(parallel=sys.argv[2], checkpoint_every=20, n_tokens=int(sys.argv[3]))
trained = train(model, rows(300), config, out=sys.argv[1], verbose=False)
print("sum", sum(float(w.sum()) for n in (0, 1) for w in trained[n].parameters()))
"""


def two_processes(tmp_path: Path, *arguments: object) -> list[str]:
    """The lines that the processes print."""
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), *map(str, arguments)]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    options = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, **options, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("sum")]


@pytest.mark.slow
def test_layers_split_over_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    printed = two_processes(tmp_path, tmp_path / "run", "layers", CONFIG.n_tokens)
    assert len(set(printed)) == 1
    assert len(printed) == 2
    model, *_ = planted_model(n_layers=2)
    alone = train(model, rows(300), CONFIG, verbose=False)
    saved = TranscoderSet.from_pretrained(tmp_path / "run")
    for layer in (0, 1):
        for name, weight in alone[layer].state_dict().items():
            assert torch.equal(weight, saved[layer].state_dict()[name]), (layer, name)


@pytest.mark.slow
def test_data_shared_by_processes_train_one_set(tmp_path: Path) -> None:
    printed = two_processes(tmp_path, tmp_path / "run", "data", CONFIG.n_tokens)
    assert len(set(printed)) == 1
    assert len(printed) == 2
    model, *_ = planted_model(n_layers=2)
    alone = train(model, rows(300), CONFIG, out=tmp_path / "alone", verbose=False)
    shared = TranscoderSet.from_pretrained(tmp_path / "run")
    # The same number of positions per step, but other ones, so only the quality is the same.
    fvu = [_last_fvu(folder) for folder in (tmp_path / "alone", tmp_path / "run")]
    assert fvu[1] == pytest.approx(fvu[0], rel=0.1)
    assert not torch.equal(alone[0].W_enc, shared[0].W_enc)


def _last_fvu(folder: Path) -> float:
    import json

    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["fvu"]


class _Two(Processes):
    """What two processes would say of their number."""

    def __init__(self) -> None:
        super().__init__()
        self.world = 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "kl"}, "runs in one process, not in 2"),
        ({"batch_size": 255, "buffer_size": 255}, "batch_size=255 does not divide by 2 processes"),
        ({"parallel": "layers", "cross_layer": True}, "cross-layer transcoder cannot be shared"),
    ],
)
def test_what_several_processes_cannot_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check_processes(CONFIG.replace(**settings), _Two())


def test_one_process_needs_no_accelerate() -> None:
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "from nnsight_transcoders.training.processes import Processes\n"
        "p = Processes(); assert (p.rank, p.world, p.is_main) == (0, 1, True)\n"
        "assert p.everywhere(True) and p.gather([3]) == [3]"
    )
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

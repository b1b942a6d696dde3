"""Whatever ends a run, it goes on to the numbers of a run that was never ended, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import CONFIG
from planted import planted_model, rows
from safetensors.torch import load_file

from nnsight_transcoders import TranscoderSet, train
from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError, MismatchError

SCRIPT = Path(__file__).parent / "interrupted_runs.py"


def interrupted(folder: Path, seed: int, kills: int) -> list[int]:
    """Make the runs of ``interrupted_runs.py``; how often two of them were killed."""
    paths = [str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(seed), str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [int(n) for n in done.stdout.split()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, interrupted(folder, seed=0, kills=10)


@pytest.fixture
def whole(runs: tuple[Path, list[int]]) -> Path:
    """The folder of a run that nothing ended."""
    return runs[0] / "whole"


def assert_same(folder: Path, whole: Path) -> None:
    one, other = (load_file(f / "layer_0.safetensors") for f in (folder, whole))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in (f / "log.jsonl").read_text().splitlines()
        ]
        for f in (folder, whole)
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, CONFIG.steps + 1))
    assert [p.name for p in (folder / "checkpoint").iterdir()] == [f"step_{CONFIG.steps:08d}"]


def test_killed_ten_times_at_random(runs: tuple[Path, list[int]], whole: Path) -> None:
    assert runs[1][0] >= 5  # on a fast machine it may be through before the tenth
    assert_same(runs[0] / "random", whole)


def test_killed_ten_times_at_file_operations(runs: tuple[Path, list[int]], whole: Path) -> None:
    """While a checkpoint is written, renamed, or an older one removed."""
    assert runs[1][1] >= 5
    assert_same(runs[0] / "files", whole)


def test_a_full_disk_says_so_and_leaves_the_last_checkpoint(
    runs: tuple[Path, list[int]], whole: Path
) -> None:
    message = (runs[0] / "full/message").read_text()
    assert "could not be written" in message
    assert "File too large" in message
    assert "intact" in message
    assert_same(runs[0] / "full", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_many_times(whole: Path, tmp_path: Path, seed: int) -> None:
    interrupted(tmp_path, seed, 25)
    assert_same(tmp_path / "random", whole)
    assert_same(tmp_path / "files", whole)


def test_killed_before_the_older_checkpoint_was_removed(whole: Path, tmp_path: Path) -> None:
    """Also where nothing is left to be trained."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoint" / f"step_{CONFIG.steps:08d}"
    shutil.copytree(newest, newest.with_name(f"step_{CONFIG.steps - 1:08d}"))
    shutil.copytree(newest, newest.with_name(f".step_{CONFIG.steps + 1:08d}.part"))
    model, *_ = planted_model()
    train(model, rows(200), CONFIG, out=folder, verbose=False)
    assert_same(folder, whole)


class Breaking(list):
    """Rows of which only the first can be read, as when a connection is lost."""

    readable = 0

    def __iter__(self) -> Iterator[Any]:
        for i, row in enumerate(super().__iter__()):
            if i == self.readable:
                raise ConnectionError("lost")
            yield row


KINDS: list[dict[str, Any]] = [
    {"activation": "jumprelu", "cross_layer": True, "optimizer": "AdamW", "skip": True},
    {"activation": "relu", "sparsity": "tanh", "decoder_norm": "unit", "input_site": "O"},
    {"activation": "topk", "optimizer": "SGD", "optimizer_options": {"momentum": 0.9}},
    {"activation": "topk", "objective": "kl", "lr": 1e-4, "pack": False},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_kind_goes_on_to_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model, *_ = planted_model(n_layers=2)
    config = CONFIG.replace(n_tokens=256 * 20, checkpoint_every=3, dead_after=500, **kind)
    start = None
    if config.end_to_end:
        local = config.replace(objective="fvu", n_tokens=512)
        start = train(model, rows(40), local, verbose=False)
    whole = train(model, rows(200), config, start=start, verbose=False)
    data = Breaking(rows(200))
    data.readable = 70
    folder = tmp_path / "run"
    with pytest.raises(ConnectionError):
        train(model, data, config, out=folder, start=start, verbose=False)
    (newest,) = (folder / "checkpoint").iterdir()
    assert 3 <= int(newest.name.removeprefix("step_")) < config.steps
    resumed = train(model, rows(200), config, out=folder, start=start, verbose=False)
    for layer in whole.layers:
        for name, weight in whole[layer].state_dict().items():
            assert torch.equal(weight, resumed[layer].state_dict()[name]), (layer, name)


# -- what a run refuses to go on with ------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A folder with the checkpoint of a run that its data ended half-way."""
    folder = tmp_path / "run"
    model, *_ = planted_model()
    train(model, iter(rows(100)), CONFIG, out=folder, verbose=False)
    assert (folder / "checkpoint").exists()
    return folder


def test_data_that_end_give_what_is_there(half: Path) -> None:
    (newest,) = (half / "checkpoint").iterdir()
    assert 10 < int(newest.name.removeprefix("step_")) < CONFIG.steps
    assert len(TranscoderSet.from_pretrained(half)) == 1


def test_other_data_are_refused(half: Path) -> None:
    model, *_ = planted_model()
    with pytest.raises(MismatchError, match="the first .* documents of this data are not those"):
        train(model, rows(200, seed=9), CONFIG, out=half, verbose=False)


def test_other_settings_are_refused_and_named(half: Path) -> None:
    model, *_ = planted_model()
    with pytest.raises(ConfigError, match=r"other settings: k \(4 there, 5 now\)"):
        train(model, rows(200), CONFIG.replace(k=5), out=half, verbose=False)


def test_settings_of_the_log_may_change(half: Path) -> None:
    model, *_ = planted_model()
    train(model, rows(200), CONFIG.replace(log_every=7), out=half, verbose=False)


def test_a_finished_run_is_not_done_again(whole: Path) -> None:
    model, *_ = planted_model()
    before = (whole / "log.jsonl").read_text()
    again = train(model, rows(200), CONFIG, out=whole, verbose=False)
    assert (whole / "log.jsonl").read_text() == before
    saved = load_file(whole / "layer_0.safetensors")
    assert torch.equal(again[0].W_enc, saved["W_enc"])


def test_a_damaged_checkpoint_is_named(half: Path) -> None:
    (newest,) = (half / "checkpoint").iterdir()
    (newest / "rank_0.safetensors").write_bytes(b"\0" * 50)
    model, *_ = planted_model()
    with pytest.raises(CheckpointError, match="step_.* is damaged"):
        train(model, rows(200), CONFIG, out=half, verbose=False)


def test_a_folder_with_another_set_is_left_alone(tmp_path: Path) -> None:
    model, *_ = planted_model()
    TranscoderSet.from_pretrained("builtin/skip").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="was not trained here"):
        train(model, rows(200), CONFIG, out=tmp_path, verbose=False)

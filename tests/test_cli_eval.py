"""``nnsight-transcoders eval``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from typer.testing import CliRunner

from nnsight_transcoders import Evaluation, TranscoderSet, evaluate, resolve_sites
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.cli import app

Run = Callable[..., Any]
TEXT = "w5 w9 w12 w5 w77 w8\n" * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two sets for it, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    zoo.hf_model("llama").save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    model = zoo.nnsight_model("llama")
    run = collect(model, resolve_sites(model), torch.arange(3, 11))
    random_transcoders(run, "per-layer", d_transcoder=24).save_pretrained(folder / "set")
    random_transcoders(run, "skip", d_transcoder=24).save_pretrained(folder / "other")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs ``eval`` on the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)
    given = ("eval", "--model", files / "model", "--transcoders", files / "set")
    return lambda *more: CliRunner().invoke(app, [str(a) for a in (*given, *more)])


def test_the_numbers_are_those_of_the_library(files, run, tmp_path):
    result = run("--data", files / "text.txt", "--json", "--out", tmp_path / "made" / "report.json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    opened = TranscoderSet.from_pretrained(files / "set")
    expected = evaluate(zoo.nnsight_model("llama"), opened, files / "text.txt")
    assert data["n_tokens"] == expected.n_tokens == 18
    assert data["together"]["ce_change"] == pytest.approx(expected.together.ce_change, abs=1e-6)
    assert [one["fvu"] for one in data["layers"]] == pytest.approx(
        [one.fvu for one in expected.layers], rel=1e-5
    )
    assert Evaluation.load(tmp_path / "made" / "report.json").to_dict() == data


def test_the_options_reach_the_library(files, run):
    options = ("--layers", "1-2", "--no-each-layer", "--max-tokens", "10", "--context", "8")
    more = ("--baseline", files / "other", "--batch-size", "2", "--json")
    result = run("--data", files / "text.txt", *options, *more)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [one["layer"] for one in data["layers"]] == [1, 2]
    assert [one["layer"] for one in data["baseline"]["layers"]] == [1, 2]
    assert data["layers"][0]["alone"] is None
    assert data["n_tokens"] == 10


def test_a_table_for_people(files, run):
    result = run("--data", files / "text.txt", "--out", "report.json")
    assert result.exit_code == 0, result.output
    assert "rec. mean" in result.stdout
    assert "report: report.json" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is needed"),
        (("--data", "none.txt"), "no file or folder"),
        (("--data", "builtin", "--layers", "x"), "numbers and ranges"),
        (("--data", "builtin", "--max-tokens", "1"), "max_tokens"),
    ],
)
def test_errors_are_one_message(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output

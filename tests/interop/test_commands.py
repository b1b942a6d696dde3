"""``export``, ``import`` and ``upload`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graphs import assert_same, named, whole
from typer.testing import CliRunner

from nnsight_transcoders import AttributionGraph, validate_graph
from nnsight_transcoders.cli import app

runner = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    done = runner.invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_there_and_back(tmp_path: Path) -> None:
    graph = named().save(tmp_path / "g.safetensors")
    out = tmp_path / "g.json"
    run("export", graph, out, "--to", "neuronpedia", "--slug", "s", "--scan", "tiny",
        "--source-set", "x")  # fmt: skip
    validate_graph(json.loads(out.read_text()), "neuronpedia")
    back = tmp_path / "back.safetensors"
    assert "graph:" in run("import", out, back)
    assert_same(AttributionGraph.load(back), named())
    assert json.loads(run("import", out, back, "--json"))["nodes"] == named().n_nodes


def test_circuit_tracers_files(tmp_path: Path) -> None:
    graph = whole().save(tmp_path / "g.safetensors")
    run("export", graph, tmp_path / "g.pt")
    assert "not recorded" in run("import", tmp_path / "g.pt", tmp_path / "i.safetensors")
    thresholds = ("--node-threshold", "0.5", "--edge-threshold", "0.9")
    run("export", graph, tmp_path / "folder", "--slug", "s", "--scan", "a/b", *thresholds)
    data = json.loads((tmp_path / "folder/s.json").read_text())
    assert len(data["nodes"]) == whole().prune(0.5, 0.9).n_nodes
    assert data["metadata"]["scan"] == "a/b"


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    graph = named().save(tmp_path / "g.safetensors")
    assert "not 'x'" in run("export", graph, tmp_path / "o", "--to", "x", code=1)
    assert "--scan is needed" in run(
        "export", graph, tmp_path / "o", "--to", "neuronpedia", "--slug", "s", code=1
    )
    assert "cannot read" in run("import", tmp_path / "none.json", tmp_path / "i", code=1)
    named().to_neuronpedia(tmp_path / "n.json", slug="s", model_id="m")
    assert "no usable API key" in run("upload", tmp_path / "n.json", code=1)

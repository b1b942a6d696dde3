"""The command line: what it prints and writes, its exit codes, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hub.layouts import joint_topk
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from nnsight_transcoders import AttributionGraph, TranscoderSet, resolve_sites
from nnsight_transcoders.check import LIMITS, random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.cli import app
from nnsight_transcoders.cli.app import parse_layers, parse_options

Run = Callable[..., Any]
PROMPT = "w5 w9 w12 w5"


# -- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a set that fits its shape, a cross-layer set and a graph."""
    folder = tmp_path_factory.mktemp("cli")
    module = zoo.hf_model("llama")
    module.save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    model = zoo.nnsight_model("llama")
    run = collect(model, resolve_sites(model), torch.arange(3, 11))
    for name, kind in (("set", "per-layer"), ("clt", "cross-layer")):
        made = random_transcoders(run, kind, d_transcoder=48, activation="topk", k=6)
        made.save_pretrained(folder / name)
    arguments = ("--out", str(folder / "traced"), *_where(folder))
    result = CliRunner().invoke(app, ["trace", PROMPT, *arguments])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty folder, without a network; arguments may be paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def trace(run: Run, files: Path) -> Run:
    """Runs ``trace`` on the tiny model."""
    return lambda *arguments: run("trace", *_where(files), *arguments)


def _where(folder: Path) -> tuple[str, ...]:
    return ("--model", str(folder / "model"), "--transcoders", str(folder / "set"))


def fails(result: Any, *words: str) -> None:
    """One message on stderr that holds ``words``, exit code 1, nothing else."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    message = result.stderr[result.stderr.index("error: ") :]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message, message


# -- trace ---------------------------------------------------------------------------------------


def test_trace_writes_a_graph_and_a_page(trace: Run, tmp_path: Path) -> None:
    result = trace(PROMPT, "--out", "new/folder")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new/folder"
    assert sorted(p.name for p in folder.iterdir()) == ["circuit.html", "graph.safetensors"]
    graph = AttributionGraph.load(folder / "graph.safetensors")
    assert graph.token_ids == (5, 9, 12, 5)
    assert graph.completeness_error < 1e-4
    assert "pruning" not in graph.metadata
    assert "<html" in (folder / "circuit.html").read_text(encoding="utf-8")
    assert "completeness error" in result.stdout
    assert "new/folder/graph.safetensors" in result.stdout


def test_trace_prints_one_json_object_and_no_progress(trace: Run, tmp_path: Path) -> None:
    result = trace(PROMPT, "--json", "--out", "out")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    data = json.loads(result.stdout)
    graph = AttributionGraph.load(tmp_path / data["graph_file"])
    assert (data["nodes"], data["edges"]) == (graph.n_nodes, graph.n_edges)
    assert data["completeness_error"] == pytest.approx(graph.completeness_error)
    assert data["pruned"]["nodes"] <= data["nodes"]
    assert [logit["token"] for logit in data["logits"]] == list(graph.target_names)
    assert (tmp_path / data["page"]).is_file()


def test_trace_passes_its_options_on(trace: Run) -> None:
    options = ["--layers", "0,2", "--target", "w7", "--target", "w8", "--max-nodes", "5"]
    thresholds = ["--node-threshold", "0.5", "--edge-threshold", "0.6"]
    result = trace(PROMPT, "--json", *options, *thresholds, "--dtype", "float64")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [logit["token"] for logit in data["logits"]] == ["w7", "w8"]
    metadata = data["metadata"]
    assert metadata["transcoder_layers"] == [0, 2]
    assert metadata["attribution_dtype"] == "float64"
    assert metadata["settings"]["max_feature_nodes"] == 5
    assert metadata["n_active_features"] > 5
    pruning = data["pruned"]["metadata"]["pruning"]
    assert (pruning["node_threshold"], pruning["edge_threshold"]) == (0.5, 0.6)


def test_trace_limits_the_logits(trace: Run) -> None:
    one = json.loads(trace(PROMPT, "--json", "--max-n-logits", "1").stdout)
    few = json.loads(trace(PROMPT, "--json", "--desired-logit-prob", "0.05").stdout)
    assert len(one["logits"]) == 1
    assert sum(logit["probability"] for logit in few["logits"][:-1]) < 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "0-x"], ["'0-3,7'", "'0-x'"]),
        (["--layers", "2-1"], ["'0-3,7'", "'2-1'"]),
        (["--layers", "\u00b2"], ["'0-3,7'"]),
        (["--layers", "0-99999999999"], ["'0-3,7'"]),
        (["--layers", "0-9"], ["has layers [0, 1, 2], not 3"]),
        (["--target", "w7 w8"], ["'w7 w8' is 2 tokens"]),
        (["--target", ""], ["is 0 tokens"]),
        (["--target", "\udcff"], ["is not UTF-8 text"]),
        (["--max-nodes", "0"], ["must be at least 1, got 0"]),
        (["--max-n-logits", "0"], ["must be at least 1, got 0"]),
        (["--desired-logit-prob", "1.5"], ["at most 1, got 1.5"]),
        (["--node-threshold", "0"], ["--node-threshold", "got 0"]),
        (["--edge-threshold", "1.01"], ["--edge-threshold", "got 1.01"]),
        (["--edge-threshold", "nan"], ["--edge-threshold", "got nan"]),
        (["--dtype", "int8"], ["'int8' is not a floating-point torch dtype"]),
        (["--device", "toaster"], ["device 'toaster' cannot be used here"]),
        (["--transcoders", "nobody/nothing"], ["nobody/nothing"]),
        (["--transcoders", "builtin/nothing"], ["builtin/per-layer"]),
        (["--transcoders", "./nothing"], ["there is no folder './nothing'"]),
        (["--model", "./nothing"], ["'./nothing'"]),
        (["--model", "nobody/nothing"], ["cannot load the model 'nobody/nothing'"]),
    ],
)
def test_trace_says_what_is_wrong(
    trace: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    fails(trace(PROMPT, "--out", "out", *arguments), *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ("w3 " * (zoo.CONTEXT + 1), f"the model takes {zoo.CONTEXT} at most"),
        ("\udcff", "is not UTF-8 text"),
    ],
)
def test_trace_refuses_prompts(trace: Run, prompt: str, words: str) -> None:
    fails(trace(prompt), words)


def test_trace_checks_thresholds_and_folder_before_it_computes(
    trace: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "nnsight_transcoders.cli.graphs.open_model", lambda *_: pytest.fail("loaded")
    )
    fails(trace(PROMPT, "--node-threshold", "2"), "--node-threshold")
    (tmp_path / "file").write_text("kept")
    fails(trace(PROMPT, "--out", "file"), "cannot write file/")
    fails(trace(PROMPT, "--out", "file/below"), "cannot write file/below/")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_trace_leaves_earlier_files_when_it_fails(
    trace: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert trace(PROMPT, "--out", "out").exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full_disk(tensors: Any, path: Path, **options: Any) -> None:
        del tensors, options
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnsight_transcoders.circuits.graph_io.save_file", full_disk)
    fails(trace(PROMPT, "--out", "out"), "No space left on device")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_set_of_another_model_is_refused_with_both_widths(run: Run, files: Path) -> None:
    result = run("trace", PROMPT, "--model", files / "model", "--transcoders", "builtin/per-layer")
    fails(result, "d_in=", f"d_model={zoo.D_MODEL}")


def test_a_cross_layer_set_cannot_be_cut(run: Run, files: Path) -> None:
    where = ("--model", files / "model", "--transcoders", files / "clt")
    fails(run("trace", PROMPT, *where, "--layers", "0,1"), "a cross-layer set cannot be cut")
    assert run("trace", PROMPT, *where).exit_code == 0


def test_another_model_needs_a_set(run: Run, files: Path) -> None:
    for command in (["trace", PROMPT], ["verify"]):
        fails(run(*command, "--model", files / "model"), "--transcoders is needed")


@pytest.mark.parametrize(
    ("text", "layers"), [("0", [0]), ("0-2,5", [0, 1, 2, 5]), (" 7 , 3-3", [7, 3])]
)
def test_parse_layers(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


# -- paths ---------------------------------------------------------------------------------------


def test_paths_of_a_feature(run: Run, files: Path, tmp_path: Path) -> None:
    traced = AttributionGraph.load(files / "traced/graph.safetensors")
    features = [traced.node(i) for i in traced.of_kind("feature").tolist()]
    node = next(one for one in features if one.layer == 2 and one.position == 3)
    options = ("--feature", node.id, "--depth", "2", "--beam", "7", "--json")
    result = run("paths", PROMPT, *_where(files), *options)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["target"] == f"feature 2 {node.index} @3"
    assert data["total"] == pytest.approx(float(traced.total[node.number]), rel=1e-3)
    assert len(data["paths"]) == 14
    assert {len(path["steps"]) for path in data["paths"]} == {1, 2}
    graph = AttributionGraph.load(tmp_path / data["graph_file"])
    assert graph.completeness_error < 1e-3
    assert (tmp_path / data["page"]).is_file()
    last = ("--feature", node.id.rpartition("_")[0])
    again = run("paths", PROMPT, *_where(files), *last, "--top", "2")
    assert again.stdout.splitlines()[0].endswith(data["target"])
    assert sum(" <- " in line for line in again.stdout.splitlines()) == 2


def test_paths_of_a_token(run: Run, files: Path) -> None:
    likeliest = json.loads(run("paths", PROMPT, *_where(files), "--json").stdout)
    traced = AttributionGraph.load(files / "traced/graph.safetensors")
    assert likeliest["target"] == traced.target_names[0]
    named = json.loads(run("paths", PROMPT, *_where(files), "--target", "w7", "--json").stdout)
    assert named["target"] == "w7"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--feature", "1-2"), "--feature takes LAYER_INDEX_POSITION"),
        (("--feature", "1_2_99"), "outside the prompt"),
        (("--feature", "9_2"), "feature 2 of layer 9 is not active"),
        (("--feature", "1_2", "--target", "w7"), "not both"),
        (("--target", "w7 w8"), "w7 w8"),
        (("--beam", "0"), "beam must be at least 1"),
    ],
)
def test_paths_says_what_is_wrong(
    run: Run, files: Path, arguments: tuple[str, ...], words: str
) -> None:
    fails(run("paths", PROMPT, *_where(files), *arguments), words)


# -- info ----------------------------------------------------------------------------------------


def test_info_of_a_graph_file(run: Run, files: Path) -> None:
    path = files / "traced/graph.safetensors"
    graph = AttributionGraph.load(path)
    assert graph.summary() in run("info", path).stdout
    data = json.loads(run("info", path, "--json").stdout)
    assert data["nodes"] == graph.n_nodes
    assert data["prompt_tokens"] == list(graph.tokens)
    assert data["metadata"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["set", "clt"])
def test_info_of_a_set(run: Run, files: Path, name: str) -> None:
    transcoders = TranscoderSet.from_pretrained(files / name)
    text = run("info", files / name)
    assert text.exit_code == 0
    assert repr(transcoders) in text.stdout
    assert "topk" in text.stdout
    data = json.loads(run("info", files / name, "--json").stdout)
    assert data["layers"]["1"] == transcoders.config(1).to_dict()
    assert data["provenance"]["format"] == "nnsight-transcoders"


def test_info_of_what_is_neither(run: Run, files: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a graph")
    (tmp_path / "empty").mkdir()
    fails(run("info", "text"), "cannot read the graph text")
    fails(run("info", "empty"), "no transcoder format is recognised in empty")
    fails(run("info", files / "model"), "no transcoder format is recognised")
    fails(run("info", files / "set/layer_0.safetensors"), "is not an attribution graph")
    fails(run("info", "nobody/nothing"), "nobody/nothing")


def test_info_of_damaged_graphs(run: Run, files: Path, tmp_path: Path) -> None:
    path = files / "traced/graph.safetensors"
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    fails(run("info", "cut"), "cannot read the graph cut")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "newer", metadata={**header, "version": "99"})
    fails(run("info", "newer"), "graph format 99", "upgrade nnsight-transcoders")
    save_file(tensors, tmp_path / "record", metadata={**header, "record": "{"})
    fails(run("info", "record"), "cannot read the graph record")
    del tensors["weight"]
    save_file(tensors, tmp_path / "less", metadata=header)
    fails(run("info", "less"), "cannot read the graph less", "weight")


# -- verify and check ----------------------------------------------------------------------------


def test_verify_says_that_random_transcoders_do_not_fit(
    run: Run, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(f"{PROMPT}\n\n w8 w9 w10 w11 w80\n", encoding="utf-8")
    arguments = ("verify", *_where(files), "--text", "text")
    result = run(*arguments, "--json")
    assert result.exit_code == 3
    data = json.loads(result.stdout)
    assert data["ok"] is False
    assert data["n_tokens"] == 9
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2]
    table = run(*arguments)
    assert table.exit_code == 3
    assert "does not fit" in table.stdout


def test_verify_refuses_texts(run: Run, files: Path, tmp_path: Path) -> None:
    (tmp_path / "latin-1").write_bytes("caf\u00e9 cr\u00e8me".encode("latin-1"))
    (tmp_path / "blank").write_text("\n  \n")
    (tmp_path / "short").write_text("w5\n")
    verify = ("verify", *_where(files), "--text")
    fails(run(*verify, "latin-1"), "latin-1 is not UTF-8 text")
    fails(run(*verify, "blank"), "blank holds no text")
    fails(run(*verify, "short"), "at least two tokens")
    fails(run(*verify, "nothing"), "nothing")
    fails(run(*verify, tmp_path), "directory")


def test_check_holds_on_the_tiny_model(run: Run, files: Path) -> None:
    result = run("check", files / "model", "--json", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert data["sites"]["unembed"] == "lm_head"
    assert all(row["value"] <= row["limit"] for row in data["rows"])


def test_check_fails_with_exit_code_3(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, torch.float32, 0.0)
    result = run("check", files / "model")
    assert result.exit_code == 3
    assert "NO" in result.stdout
    assert "final_norm: model.norm" in result.stdout


def test_check_of_what_is_no_model(run: Run, files: Path) -> None:
    fails(run("check", files / "set"), "cannot load the model")
    fails(run("check", "nobody/nothing"), "cannot load the model 'nobody/nothing'")


# -- the builtin model ---------------------------------------------------------------------------


def test_builtin_lists_what_is_shipped(run: Run) -> None:
    text = run("builtin")
    assert text.exit_code == 0
    data = json.loads(run("builtin", "--json").stdout)
    assert Path(data["model"], "config.json").is_file()
    assert data["model"] in text.stdout
    for name, folder in data["sets"].items():
        assert name in text.stdout
        assert Path(folder, "config.json").is_file()


def test_verify_finds_that_the_builtin_set_fits(run: Run) -> None:
    result = run("verify", "--json")
    assert result.exit_code == 0, result.output
    assert {layer["verdict"] for layer in json.loads(result.stdout)["layers"]} == {"fits"}


# -- the program ---------------------------------------------------------------------------------


def test_wrong_usage_is_exit_code_2(run: Run) -> None:
    for arguments in (
        ["nothing"],
        ["trace", "--nothing"],
        ["trace", "--max-nodes", "many"],
        ["trace", "two", "prompts"],
        ["info"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


def test_help_and_version(run: Run) -> None:
    from nnsight_transcoders import __version__

    assert run("--version").stdout.strip() == __version__
    assert "trace" in run("--help").stdout
    for command in ("trace", "info", "verify", "check", "builtin"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own, with pipes for a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "nnsight_transcoders", *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "40"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def test_the_program_traces_the_builtin_model(tmp_path: Path) -> None:
    done = program("trace", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    data = json.loads(done.stdout)
    assert "".join(data["prompt_tokens"]).endswith("The war lasted from 1732 to 17")
    assert (tmp_path / "out/circuit.html").is_file()


def test_the_program_fails_with_one_unbroken_line(tmp_path: Path) -> None:
    folder = tmp_path / ("long-" * 20 + "name")
    done = program("info", str(folder), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: there is no folder {str(folder)!r}; check the path\n"


# -- the choices of a format ---------------------------------------------------------------------


def test_options_of_a_format(run: Run, tmp_path: Path) -> None:
    joint_topk(tmp_path)
    (tmp_path / "config.json").unlink()
    fails(run("info", tmp_path), "pass k=...")
    shown = json.loads(
        run("info", tmp_path, "-o", "k=3", "--option", "base_model=a/b", "--json").stdout
    )
    assert shown["layers"]["0"]["k"] == 3
    assert shown["layers"]["0"]["base_model"] == "a/b"
    fails(run("info", tmp_path, "-o", "k"), "key=value", "'k'")
    fails(run("info", tmp_path, "-o", "k=[3"), "k=[3")
    fails(run("info", tmp_path, "-o", "revision=main"), "use --revision")
    fails(run("info", tmp_path, "-o", "kk=3"), "kk", "its options: k")
    fails(run("info", tmp_path, "-o", "k=3", "--format", "gemma-scope"), "gemma-scope")


def test_values_are_read_as_in_yaml() -> None:
    pairs = ["k=64", "scale=0.5", "legacy=true", "folder=a/b=c", "variant="]
    assert parse_options(pairs) == {
        "k": 64,
        "scale": 0.5,
        "legacy": True,
        "folder": "a/b=c",
        "variant": None,
    }

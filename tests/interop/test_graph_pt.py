"""circuit-tracer's ``.pt`` graphs, without circuit-tracer (``tests/peers`` has it)."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from graphs import named, whole
from setups import IDS, model, transcoders

from nnsight_transcoders import AttributionGraph, attribute
from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.interop import write_pt
from nnsight_transcoders.interop.torch_write import write_torch_file


class LogitTarget(NamedTuple):
    """As in circuit-tracer."""

    token_str: str
    vocab_idx: int


class UnifiedConfig:
    """As in circuit-tracer."""


@pytest.fixture
def their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that torch.load and torch.save find under circuit-tracer's names."""
    for name, kind in (
        ("attribution.targets", LogitTarget),
        ("utils.tl_nnsight_mapping", UnifiedConfig),
    ):
        for depth in range(name.count(".") + 1):
            path = ".".join(["circuit_tracer", *name.split(".")[: depth + 1]])
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        monkeypatch.setattr(kind, "__module__", f"circuit_tracer.{name}")
        setattr(sys.modules[f"circuit_tracer.{name}"], kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "circuit_tracer", ModuleType("circuit_tracer"))


def content(**changes: Any) -> dict[str, Any]:
    """What circuit-tracer saves: two layers, three tokens, two features of three active ones."""
    config = UnifiedConfig()
    config.__dict__.update(
        n_layers=2, d_model=8, d_head=4, n_heads=2, d_mlp=16, d_vocab=50, dtype=torch.float32,
        model_name="owner/m", tokenizer_name="owner/m", original_architecture="X",
        n_key_value_heads=None,
    )  # fmt: skip
    n_nodes = 2 + 2 * 3 + 3 + 2
    adjacency = torch.zeros(n_nodes, n_nodes)
    adjacency[0, 8 + 1] = 1.5  # token 1 -> feature 0
    adjacency[1, 0] = -0.25  # feature 0 -> feature 1
    adjacency[11, 1] = 2.0  # feature 1 -> first logit
    adjacency[12, 2 + 3 + 2] = 0.5  # error of layer 1 at position 2 -> second logit
    found = {
        "input_string": "<bos>ab",
        "adjacency_matrix": adjacency,
        "cfg": config,
        "active_features": torch.tensor([[0, 1, 7], [0, 2, 8], [1, 2, 9]]),
        "logit_targets": [LogitTarget(" x", 42), LogitTarget("x - y", 51)],
        "logit_probabilities": torch.tensor([0.75, 0.2]),
        "vocab_size": 50,
        "input_tokens": torch.tensor([1, 11, 12]),
        "selected_features": torch.tensor([0, 2]),
        "activation_values": torch.tensor([2.0, 9.0, 0.5]),
        "scan": ["a/b", "c/d"],
    }
    return {**found, **changes}


def saved(path: Path, found: dict[str, Any]) -> Path:
    torch.save(found, path)
    return path


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("their_classes")
def test_what_circuit_tracer_saves_opens(tmp_path: Path) -> None:
    graph = AttributionGraph.from_circuit_tracer(saved(tmp_path / "g.pt", content()))
    features = [graph.node(i).id for i in graph.of_kind("feature").tolist()]
    assert features == ["0_7_1", "1_9_2"]
    assert graph.value[:2].tolist() == [2.0, 0.5]
    assert graph.token_ids == (1, 11, 12)
    assert graph.tokens == ("<1>", "<11>", "<12>")
    assert graph.target_names == (" x", "x - y")
    assert graph.index[graph.of_kind("logit")].tolist() == [42, -2]
    assert graph.probability[graph.of_kind("logit")].tolist() == pytest.approx([0.75, 0.2])
    edges = {
        (graph.node(s).id, graph.node(t).id): w
        for s, t, w in zip(
            graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True
        )
    }
    assert edges == {
        ("E_11_1", "0_7_1"): 1.5,
        ("0_7_1", "1_9_2"): -0.25,
        ("1_9_2", "L_42_2"): 2.0,
        ("1_error_2", "L_-2_2"): 0.5,
    }
    assert graph.n_layers == 2
    assert graph.metadata["model"] == "owner/m"
    assert graph.metadata["circuit_tracer"]["scan"] == ["a/b", "c/d"]
    assert "completeness not recorded" in graph.summary()


@pytest.mark.usefixtures("their_classes")
def test_older_files_open(tmp_path: Path) -> None:
    older = content(
        logit_targets=torch.tensor([42, 43]), activation_values=torch.tensor([2.0, 0.5])
    )
    graph = AttributionGraph.from_circuit_tracer(saved(tmp_path / "g.pt", older))
    assert graph.target_names == ("<42>", "<43>")
    assert graph.value[:2].tolist() == [2.0, 0.5]


def adjacency(row: int, column: int, value: float) -> torch.Tensor:
    found = content()["adjacency_matrix"].clone()
    found[row, column] = value
    return found


@pytest.mark.usefixtures("their_classes")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adjacency_matrix": torch.zeros(5, 5)}, "expected \\(13, 13\\)"),
        ({"adjacency_matrix": adjacency(0, 9, float("nan"))}, "entries that are no numbers"),
        ({"adjacency_matrix": adjacency(0, 1, 1.0)}, "do not point upward"),
        ({"adjacency_matrix": adjacency(5, 0, 1.0)}, "into error nodes or tokens"),
        ({"adjacency_matrix": None}, "no tensor 'adjacency_matrix'"),
        ({"active_features": torch.tensor([[5, 1, 7]] * 3)}, "that cannot be"),
        ({"active_features": torch.zeros(3, 3)}, "whole numbers"),
        ({"selected_features": torch.tensor([0, 3])}, "not among the active"),
        ({"activation_values": torch.zeros(7)}, "one per feature"),
        ({"logit_probabilities": torch.zeros(3)}, "one per target"),
        ({"logit_targets": []}, "no logit_targets"),
        ({"logit_targets": [("x", 1)] * 2}, "no logit_targets"),
        ({"logit_targets": [LogitTarget("x", -1)] * 2}, "are not \\(text"),
        ({"input_tokens": "abc"}, "no input_tokens"),
        ({"cfg": {"n_layers": 2}}, "no n_layers"),
        ({"cfg": UnifiedConfig()}, "no n_layers"),
        ({"vocab_size": "many"}, "no vocab_size"),
    ],
)
def test_damaged_graphs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = saved(tmp_path / "g.pt", content(**changes))
    with pytest.raises(CheckpointError, match=message):
        AttributionGraph.from_circuit_tracer(path)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.usefixtures("their_classes")
def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for found in (content(cfg=Hostile(marker)), content(more=Hostile(marker)), Hostile(marker)):
        path = saved(tmp_path / "g.pt", found)
        with pytest.raises(CheckpointError, match="refused"):
            AttributionGraph.from_circuit_tracer(path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(CheckpointError):
        AttributionGraph.from_circuit_tracer(tmp_path / "plain.pt")
    assert not marker.exists()


def test_a_file_cannot_change_the_stand_ins(tmp_path: Path) -> None:
    """A pickle may set attributes of the classes it gets: those are the file's own."""
    code = (
        b"\x80\x02ccircuit_tracer.attribution.targets\nLogitTarget\n"
        b"N}X\x09\x00\x00\x00token_strK\x07s\x86b."
    )
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(CheckpointError):
        AttributionGraph.from_circuit_tracer(tmp_path / "g.pt")
    from nnsight_transcoders.interop.graph_pt import LogitTarget as ours

    assert ours("x", 1).token_str == "x"


def test_no_file_and_no_graph(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        AttributionGraph.from_circuit_tracer(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no mapping"):
        AttributionGraph.from_circuit_tracer(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError):
        AttributionGraph.from_circuit_tracer(tmp_path / "text.pt")


# -- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
def test_a_graph_comes_back(tmp_path: Path, kind: str, pruned: bool) -> None:
    graph = whole(kind).prune() if pruned else whole(kind)
    path = graph.to_circuit_tracer(tmp_path / "g.pt", scan="owner/set")
    found = AttributionGraph.from_circuit_tracer(path)
    assert found.token_ids == graph.token_ids
    assert found.target_names == graph.target_names
    assert found.metadata["circuit_tracer"]["scan"] == "owner/set"
    ids = [node.id for node in found.nodes()]
    number = torch.tensor([ids.index(node.id) for node in graph.nodes()])
    assert torch.equal(found.adjacency()[number][:, number], graph.adjacency())
    assert found.n_edges == graph.n_edges
    assert torch.equal(found.probability[number], graph.probability)
    features = graph.of_kind("feature")
    assert torch.equal(found.value[number[features]], graph.value[features])
    assert found.replacement_score == pytest.approx(graph.replacement_score)
    again = found.to_circuit_tracer(tmp_path / "again.pt")
    assert again.read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:  # no date in it: the same graph is the same file
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.usefixtures("their_classes")
def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    graph = whole()
    path = graph.to_circuit_tracer(tmp_path / "g.pt", scan="x", config={"d_mlp": 48})
    with torch.serialization.safe_globals([LogitTarget, UnifiedConfig]):
        found = torch.load(path, weights_only=True)
    assert found["cfg"].n_layers == zoo.N_LAYERS
    assert found["cfg"].d_model == zoo.D_MODEL
    assert found["cfg"].d_vocab == found["vocab_size"] == zoo.VOCAB
    assert found["cfg"].d_mlp == 48
    assert [target.token_str for target in found["logit_targets"]] == list(graph.target_names)
    assert found["active_features"].shape == (len(graph.of_kind("feature")), 3)
    assert torch.equal(found["adjacency_matrix"], graph.adjacency())
    assert found["input_tokens"].tolist() == list(IDS)


def test_directions_come_back_as_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    ways = [(f"way {i}", torch.randn(zoo.D_MODEL)) for i in range(2)]
    graph = attribute(model("llama"), transcoders("llama", "per-layer"), IDS, targets=ways)
    found = AttributionGraph.from_circuit_tracer(graph.to_circuit_tracer(tmp_path / "g.pt"))
    assert found.index[found.of_kind("logit")].tolist() == [-1, -2]
    assert found.target_names == ("way 0", "way 1")


def test_what_was_read_can_be_intervened_on(tmp_path: Path) -> None:
    graph = whole()
    found = AttributionGraph.from_circuit_tracer(graph.to_circuit_tracer(tmp_path / "g.pt"))
    tiny, chosen, name = model("llama"), transcoders("llama", "per-layer"), graph.node(0).id
    expected, result = (one.intervene({name: 0}, tiny, chosen) for one in (graph, found))
    assert torch.equal(result.logits_after, expected.logits_after)
    logits = (found.of_kind("logit"), graph.of_kind("logit"))
    torch.testing.assert_close(result.predicted[logits[0]], expected.predicted[logits[1]])


def test_tokens_from_a_tokenizer(tmp_path: Path) -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"t{ids[0]}"

    found = AttributionGraph.from_circuit_tracer(whole().to_circuit_tracer(tmp_path / "g.pt"))
    assert found.with_tokens(Tokenizer()).tokens == tuple(f"t{i}" for i in IDS)


def test_graphs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g.pt"
    with pytest.raises(InputError, match="token ids"):
        replace(named(), token_ids=(-1,) * len(IDS)).to_circuit_tracer(path)
    with pytest.raises(InputError, match="config has no wings"):
        named().to_circuit_tracer(path, config={"wings": 2})
    monkeypatch.setattr(write_pt, "MAX_ELEMENTS", 10)
    with pytest.raises(InputError, match="prune the graph first"):
        named().to_circuit_tracer(path)
    assert not path.exists()


def test_plain_data_is_written_as_torch_does(tmp_path: Path) -> None:
    data = {
        "none": None,
        "flags": [True, False],
        "numbers": (0, -1, 255, -(2**70), 1.5, float("inf")),
        "text": "ä\n😀",
        "empty": [[], {}, (), ""],
        "tensors": [torch.arange(6).view(2, 3).T, torch.zeros(0, 3), torch.tensor(1.5)],
        "half": torch.randn(3).bfloat16(),
    }
    write_torch_file(data, tmp_path / "data.pt")
    found = torch.load(tmp_path / "data.pt", weights_only=True)
    assert repr(found) == repr(data)
    with pytest.raises(TypeError, match="cannot be written"):
        write_torch_file({"x": {1, 2}}, tmp_path / "set.pt")

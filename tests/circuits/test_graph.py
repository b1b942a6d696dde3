"""The graph type: lookup, files, influence, scores, pruning; on a small graph written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networkx
import pytest
import torch
from setups import IDS, model, transcoders

from nnsight_transcoders import AttributionGraph, attribute
from nnsight_transcoders.circuits import prune
from nnsight_transcoders.errors import CheckpointError, InputError


def hand_built() -> AttributionGraph:
    """Two tokens, one error, two features, two logits; every number chosen, so that it closes."""
    edges = {  # (source, target): weight
        (3, 0): 2.0,
        (2, 0): -1.0,
        (0, 1): 1.5,
        (4, 1): 0.5,
        (1, 5): 3.0,
        (2, 5): 1.0,
        (0, 6): -2.0,
        (3, 6): 2.0,
    }
    source, target = torch.tensor(list(edges)).T
    weight = torch.tensor(list(edges.values()))
    bias = torch.tensor([0.25, -0.5, 0, 0, 0, 1.0, 0.5])
    total = bias.clone().index_add(0, target, weight)
    total[2:5] = 0
    return AttributionGraph(
        kind=torch.tensor([0, 0, 1, 2, 2, 3, 3], dtype=torch.uint8),
        layer=torch.tensor([0, 1, 0, -1, -1, 2, 2]),
        position=torch.tensor([0, 1, 0, 0, 1, 1, 1]),
        index=torch.tensor([5, 9, -1, 11, 12, 20, 21]),
        value=torch.tensor([1.25, 1.5, 0.7, 1.0, 1.1, 5.0, 0.5]),
        source=source,
        target=target,
        weight=weight,
        total=total,
        bias=bias,
        omitted=torch.zeros(7),
        probability=torch.tensor([0, 0, 0, 0, 0, 0.6, 0.3]),
        tokens=("a", " b"),
        token_ids=(11, 12),
        target_names=(" c", " d"),
        metadata={"n_layers": 2},
    )


def dense_influence(graph: AttributionGraph) -> torch.Tensor:
    """``p ((I - B)^-1 - I)`` with dense matrices."""
    size = graph.adjacency().abs().double()
    shares = size / size.sum(1, keepdim=True).clamp_min(1e-300)
    eye = torch.eye(graph.n_nodes, dtype=torch.float64)
    return graph.logit_weights().double() @ (torch.linalg.inv(eye - shares) - eye)


def test_nodes_and_edges() -> None:
    graph = hand_built()
    assert [n.id for n in graph.nodes()] == [
        "0_5_0",
        "1_9_1",
        "0_error_0",
        "E_11_0",
        "E_12_1",
        "L_20_1",
        "L_21_1",
    ]
    assert graph.find(1, 9, 1).number == 1
    assert [(n.id, w) for n, w in graph.edges_into(0)] == [("E_11_0", 2.0), ("0_error_0", -1.0)]
    assert [n.id for n, _ in graph.edges_out_of(0)] == ["L_21_1", "1_9_1"]
    assert graph.adjacency()[5, 1] == 3.0
    assert graph.label(5) == "logit ' c' p=0.600"
    assert "completeness error" in repr(graph)


@pytest.mark.parametrize("call", ["node", "find", "kind"])
def test_lookup_errors(call: str) -> None:
    graph = hand_built()
    with pytest.raises(InputError):
        if call == "node":
            graph.node(7)
        elif call == "find":
            graph.find(0, 5, 1)
        else:
            graph.of_kind("neuron")


def test_closure_and_completeness_error() -> None:
    graph = hand_built()
    assert graph.completeness_error < 1e-7
    graph.weight[0] += 1.0
    assert graph.completeness_error > 0.1


def test_influence_is_the_finite_power_sum() -> None:
    for graph in (hand_built(), attribute(model("gpt2"), transcoders("gpt2", "per-layer"), IDS)):
        assert torch.allclose(graph.influence(), dense_influence(graph), atol=1e-9)


def test_a_cycle_is_refused() -> None:
    one = torch.tensor([1.0, 1.0])
    with pytest.raises(InputError, match="cycle"):
        prune.influence(torch.tensor([0, 1]), torch.tensor([1, 0]), one, torch.tensor([1.0, 0]), 2)


def test_scores_by_hand() -> None:
    graph = hand_built()
    influence = dense_influence(graph)
    tokens, errors = influence[3:5].sum(), influence[2]
    assert graph.replacement_score == pytest.approx(float(tokens / (tokens + errors)))
    size = graph.adjacency().abs().double()
    from_error = (size[:, 2] / size.sum(1).clamp_min(1e-300)).nan_to_num()
    output = influence + graph.logit_weights()
    expected = float(((1 - from_error) * output).sum() / output.sum())
    assert graph.completeness_score == pytest.approx(expected)


def test_replacement_score_is_one_without_errors_and_zero_without_features() -> None:
    graph = hand_built()
    no_error = graph.subgraph(graph.kind != 1)
    assert no_error.replacement_score == 1.0
    only_error = graph.subgraph(torch.ones(7, dtype=torch.bool), graph.source == 2)
    assert only_error.replacement_score == 0.0


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize(("node", "edge"), [(0.8, 0.98), (0.5, 0.9), (1.0, 1.0), (0.2, 0.5)])
def test_pruning_keeps_the_fewest_that_carry_the_share(kind: str, node: float, edge: float) -> None:
    graph = attribute(model("gpt2"), transcoders("gpt2", kind), IDS)
    pruned = graph.prune(node, edge)
    assert pruned.completeness_error < 1e-4
    assert pruned.n_nodes <= graph.n_nodes
    kept = {n.id for n in pruned.nodes()}
    assert {n.id for n in graph.nodes() if n.kind in ("token", "logit")} <= kept
    influence = graph.influence()
    order = influence.argsort(descending=True)
    needed = int((influence[order].cumsum(0) < node * influence.sum()).sum()) + 1
    allowed = {graph.node(int(i)).id for i in order[:needed]}
    assert {n.id for n in pruned.nodes() if n.kind in ("feature", "error")} <= allowed
    for n in pruned.nodes():
        if n.kind in ("feature", "error"):
            assert pruned.edges_out_of(n.number)
        if n.kind == "feature":
            assert pruned.edges_into(n.number)
    assert pruned.metadata["pruning"]["nodes_before"] == graph.n_nodes
    assert pruned.metadata["pruning"]["replacement_score_before"] == pytest.approx(
        graph.replacement_score
    )


@pytest.mark.parametrize(("node", "edge"), [(0.0, 0.9), (1.1, 0.9), (0.8, 0.0), (0.8, -1)])
def test_bad_thresholds(node: float, edge: float) -> None:
    with pytest.raises(InputError, match="threshold"):
        hand_built().prune(node, edge)


def test_save_and_load(tmp_path: Path) -> None:
    graph = attribute(model("llama"), transcoders("llama", "skip"), IDS).prune()
    loaded = AttributionGraph.load(graph.save(tmp_path / "new" / "graph.safetensors"))
    assert torch.equal(loaded.adjacency(), graph.adjacency())
    assert torch.equal(loaded.influence(), graph.influence())
    assert list(loaded.nodes()) == list(graph.nodes())
    assert loaded.metadata == graph.metadata
    assert (loaded.tokens, loaded.target_names) == (graph.tokens, graph.target_names)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["graph.safetensors"]


def test_load_refuses_other_and_damaged_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="not an attribution graph"):
        AttributionGraph.load(other)
    outside = hand_built()
    outside.source[0] = 99
    with pytest.raises(CheckpointError, match="source names nodes outside"):
        AttributionGraph.load(outside.save(tmp_path / "outside.safetensors"))
    nameless = replace(hand_built(), target_names=("one",))
    with pytest.raises(CheckpointError, match="number of target names"):
        AttributionGraph.load(nameless.save(tmp_path / "nameless.safetensors"))
    good = hand_built().save(tmp_path / "graph.safetensors")
    good.write_bytes(good.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cannot read"):
        AttributionGraph.load(good)
    with pytest.raises(CheckpointError, match="cannot read"):
        AttributionGraph.load(tmp_path / "missing.safetensors")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = hand_built().save(tmp_path / "graph.safetensors")
    before = path.read_bytes()
    bad = hand_built()
    bad.metadata["not json"] = object()
    with pytest.raises(TypeError):
        bad.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["graph.safetensors"]
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        hand_built().save(blocked / "graph.safetensors")


def test_networkx() -> None:
    graph = hand_built()
    out = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(out)
    assert out.number_of_edges() == graph.n_edges
    assert out.edges["1_9_1", "L_20_1"]["weight"] == 3.0

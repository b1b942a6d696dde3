"""Paths as a graph: it closes, and with all paths followed it is the graph of ``attribute``."""

from __future__ import annotations

from functools import cache
from pathlib import Path as FilePath
from typing import Any

import nnsight
import pytest
import torch
import transformers
import zoo

from nnsight_transcoders import AttributionGraph, TranscoderSet, attribute
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.circuits.contributions import CircuitRun, FeatureVector
from nnsight_transcoders.circuits.path_graph import path_graph
from nnsight_transcoders.circuits.paths import Path, Where, top_paths
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import resolve_sites

IDS = [3, 9]
NAMES = ["gpt2", "llama", "gemma2", "gpt-neox", "opt", "qwen2", "falcon-new", "olmo2"]
WIDE: dict[str, Any] = {"depth": 6, "per_node": 10**6, "beam": 10**9}


@cache
def shallow(name: str, kind: str, ids: tuple[int, ...] = tuple(IDS)) -> tuple[Any, TranscoderSet]:
    """A model of two layers in float64, and a small random set for it."""
    cls, options = zoo.CONFIGS[name]
    depth = {k: 2 for k in ("num_hidden_layers", "n_layer", "num_layers") if k in options}
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, cls)(**{**options, **depth}), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model = nnsight.TransformersModel(
        module.double().eval(), task="text-generation", tokenizer=zoo.tokenizer()
    )
    run = collect(model, resolve_sites(model), torch.tensor(ids))
    return model, random_transcoders(run, kind, d_transcoder=6)  # type: ignore[arg-type]


def edges(graph: AttributionGraph, number: int) -> dict[str, float]:
    return {node.id: weight for node, weight in graph.edges_into(number)}


def assert_same_rows(found: AttributionGraph, expected: AttributionGraph) -> None:
    """Every target of ``found`` has the row that it has in ``expected``."""
    numbers = {node.id: node.number for node in expected.nodes()}
    for node in found.nodes():
        if node.kind not in ("feature", "logit"):
            continue
        other = numbers[node.id]
        assert edges(found, node.number) == pytest.approx(edges(expected, other), rel=1e-6)
        for name in ("total", "bias", "value", "probability"):
            wanted = float(getattr(expected, name)[other])
            assert float(getattr(found, name)[node.number]) == pytest.approx(wanted, rel=1e-5)
        assert float(found.omitted[node.number]) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_all_paths_give_the_rows_of_attribute(name: str, kind: str) -> None:
    model, transcoders = shallow(name, kind)
    circuit = CircuitRun.collect(model, transcoders, IDS)
    target = circuit.token(5)
    found = path_graph(circuit, target, top_paths(circuit, target, **WIDE))
    assert found.completeness_error < 1e-6
    assert len(found.of_kind("feature")) > 3
    assert_same_rows(found, attribute(model, transcoders, IDS, targets=[5]))


@cache
def narrow(kind: str = "skip") -> tuple[CircuitRun, FeatureVector, list[Path]]:
    ids = (3, 9, 12)
    model, transcoders = shallow("gpt2", kind, ids)
    circuit = CircuitRun.collect(model, transcoders, list(ids))
    target = circuit.token(5)
    return circuit, target, top_paths(circuit, target, depth=5, per_node=20, beam=60)


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
def test_a_few_paths_close_with_what_they_left_out(kind: str) -> None:
    circuit, target, paths = narrow(kind)
    graph = path_graph(circuit, target, paths)
    assert graph.completeness_error < 1e-6
    assert graph.omitted.abs().max() > 1e-3
    touched = {
        (s.kind, s.layer, s.position, s.index)
        for p in paths
        for s in p.steps
        if s.kind == "feature"
    }
    assert len(graph.of_kind("feature")) == len(touched)


def test_edges_are_in_the_targets_own_units_and_count_a_segment_once() -> None:
    """A feature reached along two paths has the edges that it has as a root."""
    circuit, target, _ = narrow("per-layer")
    paths = top_paths(circuit, target, depth=5, per_node=10**6, beam=10**9)
    feature = next(s for p in paths for s in p.steps[:-1] if s.kind == "feature" and s.layer == 1)
    above = [p for p in paths if p.contains(feature)]
    graph = path_graph(circuit, target, above)
    root = circuit.feature(feature.layer, feature.index, feature.position)
    alone = path_graph(circuit, root, top_paths(circuit, root, **{**WIDE, "depth": 4}))
    number = graph.find(feature.layer, feature.index, feature.position).number
    assert edges(graph, number) == pytest.approx(edges(alone, alone.n_nodes - 1), rel=1e-6)


def test_it_is_a_graph_like_any_other(tmp_path: FilePath) -> None:
    circuit, target, paths = narrow()
    graph = path_graph(circuit, target, paths)
    pruned = graph.prune(0.7, 0.9)
    assert pruned.n_nodes <= graph.n_nodes
    assert pruned.completeness_error < 1e-6
    again = AttributionGraph.load(graph.save(tmp_path / "graph.safetensors"))
    assert torch.equal(again.weight, graph.weight)
    assert again.target_names == ("w5",)
    assert "completeness" in graph.to_html(tmp_path / "graph.html")
    assert "most influential" in str(graph)
    direction = circuit.token(("up", torch.ones(zoo.D_MODEL)))
    graph = path_graph(circuit, direction, top_paths(circuit, direction, depth=2))
    assert graph.node(graph.n_nodes - 1).index == -1
    assert float(graph.logit_weights()[-1]) == 1.0


def test_paths_of_something_else() -> None:
    circuit, target, paths = narrow()
    with pytest.raises(InputError, match="there are no paths"):
        path_graph(circuit, target, [])
    with pytest.raises(InputError, match="leads to 'w5', but the target is 'w6'"):
        path_graph(circuit, circuit.token(6), paths)
    other = CircuitRun.collect(*shallow("gpt2", "skip", (3, 9, 12)), [3, 9])
    with pytest.raises(InputError, match="another run"):
        path_graph(other, other.token(5), paths)


def test_path_queries() -> None:
    circuit, target, _ = narrow("per-layer")
    paths = top_paths(circuit, target, depth=3, per_node=30, beam=2000)
    feature, attention, token = (Where(kinds={kind}) for kind in ("feature", "attention", "token"))
    long = next(p for p in paths if [s.kind for s in p.steps] == ["feature", "attention", "token"])
    assert long.contains(feature)
    assert long.contains([feature, attention])
    assert long.contains([attention, token])
    assert not long.contains([feature, token])
    assert not long.contains([attention, token, token])
    assert long.ends_in(token)
    assert long.ends_in([attention, token])
    assert not long.ends_in(feature)
    assert long.ends_in(long)
    assert not Path(long.root, long.steps[:2]).ends_in(long)
    # A component is the same wherever it lies, though what it carries differs.
    step = next(s for p in paths for s in p.steps[1:] if s.kind == "feature")
    through = [p for p in paths if p.contains(step)]
    assert len({p.value for p in through}) > 1
    assert len(through) + len([p for p in paths if p.avoids(step)]) == len(paths)
    with pytest.raises(InputError, match="an empty sub-path"):
        long.contains([])

"""Contributions and paths: they close at every node, and the greedy search finds what is there."""

from __future__ import annotations

from functools import cache
from typing import Any

import nnsight
import pytest
import torch
import zoo
from setups import IDS, model, transcoders

from nnsight_transcoders import attribute
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.circuits.contributions import CircuitRun, Contribution, FeatureVector
from nnsight_transcoders.circuits.paths import Path, Where, merge_paths, top_paths
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import resolve_sites

KINDS = ["per-layer", "skip", "cross-layer"]


@cache
def circuit(name: str, kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> CircuitRun:
    return CircuitRun.collect(model(name, dtype), transcoders(name, kind, dtype, **config), IDS)


def closure(run: CircuitRun, target: FeatureVector) -> float:
    """Relative difference of the contributions' sum and the target."""
    found = run.contributions(target)
    size = max(abs(run.total(target)), max(abs(c.value) for c in found))
    return abs(sum(c.value for c in found) - run.total(target)) / size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_closes_at_every_node(name: str, kind: str, dtype: torch.dtype, limit: float) -> None:
    """Root and everything one step below it: features, heads and skip paths."""
    run = circuit(name, kind, dtype)
    root = run.token(5)
    assert closure(run, root) < limit
    for by in run.contributions(root):
        if by.kind in ("feature", "attention", "skip"):
            below = run.extend(root, by)
            assert run.total(below) == pytest.approx(by.value, rel=1e-2, abs=1e-4)
            assert closure(run, below) < limit


@pytest.mark.parametrize(("input_site", "output_site"), [("R", "O'"), ("N0", "O'"), ("N0", "O")])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt-neox", "llama"])
def test_closes_at_every_site(name: str, input_site: str, output_site: str) -> None:
    run = circuit(name, "skip", input_site=input_site, output_site=output_site)
    for layer, active in run.active.layers.items():
        target = run.feature(layer, int(active.index[-1]), int(active.position[-1]))
        assert closure(run, target) < 1e-4
        assert run.total(target) == pytest.approx(float(active.pre_activation[-1]), rel=1e-3)


def test_logit_target_is_the_demeaned_logit() -> None:
    run = circuit("gemma2", "per-layer")
    logits = run.run.logits[-1]
    assert run.total(run.token("w5")) == pytest.approx(float(logits[5] - logits.mean()), rel=1e-4)


def test_feature_factors() -> None:
    """Input-dependent times input-invariant: value = activation x decoder row . vector."""
    run, chosen = circuit("gpt2", "per-layer"), transcoders("gpt2", "per-layer")
    target = run.token(7)
    features = [c for c in run.contributions(target) if c.kind == "feature"]
    assert features
    for c in features:
        assert c.value == pytest.approx(c.activation * c.weight, rel=1e-5)
        row = chosen.rows(c.layer, [c.index])[0]
        assert c.weight == pytest.approx(float(row @ target.vector), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox", "falcon-new"])
def test_heads_add_up_to_attention(name: str) -> None:
    run = circuit(name, "per-layer")
    target = run.token(5)
    for layer, block in enumerate(run.frozen.layers):
        heads = sum(
            c.value for c in run.contributions(target) if c.kind == "attention" and c.layer == layer
        )
        linear = block.attend(run._resid[layer], constants=False)[target.position]
        assert heads == pytest.approx(float(linear @ target.vector), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_paths_through_attention_sum_to_the_graphs_edges(kind: str) -> None:
    """All ways from one feature to another without a feature between are the edge."""
    run = circuit("llama", kind, torch.float64)
    graph = attribute(model("llama", torch.float64), transcoders("llama", kind, torch.float64), IDS)
    last = [n for n in graph.nodes() if n.kind == "feature" and n.layer == 1][-1]

    def flow(target: FeatureVector) -> dict[tuple[int, int, int], float]:
        found: dict[tuple[int, int, int], float] = {}
        for c in run.contributions(target):
            if c.kind == "feature":
                key = (c.layer, c.index, c.position)
                found[key] = found.get(key, 0.0) + c.value
            elif c.kind in ("attention", "skip"):
                for key, value in flow(run.extend(target, c)).items():
                    found[key] = found.get(key, 0.0) + value
        return found

    found = flow(run.feature(last.layer, last.index, last.position))
    edges = {
        (n.layer, n.index, n.position): w
        for n, w in graph.edges_into(last.number)
        if n.kind == "feature"
    }
    assert edges.keys() <= found.keys()
    for key, value in found.items():
        assert value == pytest.approx(edges.get(key, 0.0), rel=1e-6, abs=1e-9)


@cache
def small() -> tuple[CircuitRun, FeatureVector]:
    nn_model = zoo.nnsight_model("llama", dtype=torch.float64)
    nn_model._module.model.layers = nn_model._module.model.layers[:2]
    nn_model._module.config.num_hidden_layers = 2
    wrapped = nnsight.NNsight(nn_model._module)
    sites = resolve_sites(wrapped)
    run = collect(wrapped, sites, torch.tensor([3, 9, 12]))
    chosen = random_transcoders(run, "per-layer", d_transcoder=6)
    circuit_run = CircuitRun.collect(wrapped, chosen, [3, 9, 12])
    return circuit_run, circuit_run.token(5)


def enumerate_paths(run: CircuitRun, target: FeatureVector, depth: int) -> list[Path]:
    """Every path up to a depth, by brute force."""
    found: list[Path] = []

    def walk(steps: tuple[Contribution, ...], vector: FeatureVector) -> None:
        for c in run.contributions(vector):
            found.append(Path(target.name, (*steps, c)))
            if c.kind in ("feature", "attention", "skip") and len(steps) + 1 < depth:
                walk((*steps, c), run.extend(vector, c))

    walk((), target)
    return sorted(found, key=lambda path: -abs(path.value))


def test_wide_beam_is_enumeration_and_ended_paths_sum_to_the_root() -> None:
    run, root = small()
    every = enumerate_paths(run, root, depth=3)
    found = top_paths(run, root, depth=3, per_node=10**6, beam=10**9)
    assert [p.value for p in found] == pytest.approx([p.value for p in every])
    # A path that ended, or was cut at the last depth, stands for all below it.
    leaves = [p for p in found if p.ended or len(p.steps) == 3]
    assert sum(p.value for p in leaves) == pytest.approx(run.total(root), rel=1e-5)


def test_recall_grows_with_the_beam() -> None:
    run, root = small()
    best = {p.steps for p in enumerate_paths(run, root, depth=3) if p.ended and len(p.steps) == 3}
    best = set(sorted(best, key=lambda steps: -abs(steps[-1].value))[:10])

    def recall(beam: int) -> float:
        found = {p.steps for p in top_paths(run, root, depth=3, per_node=200, beam=beam)}
        return len(best & found) / len(best)

    recalls = [recall(beam) for beam in (5, 50, 10**6)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1.0


def test_inhibitory_paths_are_kept() -> None:
    """Ranking by signed value would drop them."""
    run, root = small()
    every = [c.value for c in run.contributions(root)]
    lowest = min(every)
    assert lowest < 0
    found = top_paths(run, root, depth=1, per_node=len(every) // 2, beam=100)
    assert min(p.value for p in found) == pytest.approx(lowest)


def test_filters() -> None:
    run, root = small()
    every = run.contributions(root)

    def chosen(where: Where) -> set[Contribution]:
        return {c for c in every if where(c)}

    features, first = Where(kinds={"feature"}), Where(layers=range(1))
    assert {c.kind for c in chosen(features)} == {"feature"}
    assert {c.layer for c in chosen(first)} == {0}
    assert chosen(features & first) == chosen(features) & chosen(first)
    assert chosen(features | first) == chosen(features) | chosen(first)
    assert chosen(~features) == set(every) - chosen(features)
    assert {c.index for c in chosen(Where(heads=[1, 2]))} == {1, 2}
    assert all(c.kind == "attention" for c in chosen(Where(heads=[1, 2])))
    assert {c.position for c in chosen(Where(positions={0}))} == {0}
    found = top_paths(run, root, depth=2, where=~Where(kinds={"attention"}))
    assert not any(step.kind == "attention" for path in found for step in path.steps)


def test_merged_graph_closes() -> None:
    run, root = small()
    graph = merge_paths(run, root, top_paths(run, root, depth=3, per_node=4, beam=20))
    nodes = {edge.target for edge in graph.edges}
    for node in nodes:
        reached = graph.total if node is None else node.value
        assert sum(edge.value for edge in graph.into(node)) == pytest.approx(reached)
    text = str(graph)
    assert text.startswith(f"{run.total(root):+.4f}")
    assert "(not followed)" in text


def test_errors() -> None:
    run, root = small()
    with pytest.raises(InputError, match="not active"):
        run.feature(0, 99, 0)
    with pytest.raises(InputError, match="outside the prompt"):
        run.token(5, position=7)
    with pytest.raises(InputError, match="a path ends at a token"):
        run.extend(root, Contribution("token", -1, 0, -1, 1.0))
    for options in ({"depth": 0}, {"per_node": 0}, {"beam": 0}):
        with pytest.raises(InputError, match="at least 1"):
            top_paths(run, root, **options)

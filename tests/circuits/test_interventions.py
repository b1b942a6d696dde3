"""Interventions in the real model against edges, path sums, and ``attach``."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
import zoo
from intervention_support import ALL, KINDS, close, graph_of, some
from setups import IDS, model, transcoders

from nnsight_transcoders import (
    AttributionGraph,
    TranscoderSet,
    attach,
    attribute,
    builtin_model_path,
    predicted_vs_measured,
)
from nnsight_transcoders.builtin.text import examples
from nnsight_transcoders.circuits.effects import agreement, top_features
from nnsight_transcoders.circuits.interventions import intervene_each
from nnsight_transcoders.circuits.predict import path_sums, predicted_changes
from nnsight_transcoders.errors import InputError, MismatchError, SiteError
from nnsight_transcoders.sites import resolve_sites


def through_relu(graph: AttributionGraph, change: torch.Tensor, but: int) -> torch.Tensor:
    """Changes of pre-activations as changes of activations: a feature cannot fall below zero."""
    off = (graph.kind == 0) & (change < -graph.value)
    off[but] = False
    return torch.where(off, -graph.value, change)


# -- everything held: the edges ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_with_all_layers_constrained_the_effects_are_the_edges(name: str, kind: str) -> None:
    nn_model, chosen, graph = graph_of(name, kind)
    others = [graph.of_kind("error")[len(IDS) // 2], graph.of_kind("token")[1]]
    numbers, factors = [*some(graph), *map(int, others)], [0.0, -2.0, 3.0]
    asked = [{n: factors[i % 3]} for i, n in enumerate(numbers)]
    edges = graph.adjacency()
    for one, found in zip(
        asked, intervene_each(graph, asked, nn_model, chosen, constrained=ALL), strict=True
    ):
        ((number, factor),) = one.items()
        expected = edges[:, number] * (factor - 1)
        expected[number] = (factor - 1) * graph.value[number]
        at = graph.is_target
        close(found.predicted[at], expected[at], 1e-12)
        close(found.measured[at], through_relu(graph, expected, number)[at])
        assert found.measured[~at].isnan().all()


@pytest.mark.parametrize(("input_site", "output_site"), [("R", "O'"), ("N0", "O'"), ("N0", "O")])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "falcon-new", "olmo2"])
def test_at_every_site(name: str, input_site: str, output_site: str) -> None:
    if name == "olmo2" and input_site == "N0":
        pytest.skip("it has no norm before its MLP")
    nn_model, chosen, graph = graph_of(
        name, "cross-layer", input_site=input_site, output_site=output_site
    )
    number = some(graph)[0]
    found = graph.intervene({number: 0}, nn_model, chosen, constrained=ALL)
    at = graph.is_target
    at[number] = False
    expected = through_relu(graph, -graph.adjacency()[:, number], number)
    close(found.measured[at], expected[at])


# -- features follow: the path sums --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt-neox", "opt", "bloom"])
def test_where_transcoders_respond_the_effects_are_the_path_sums(name: str, kind: str) -> None:
    """By so little that no feature goes on or off, so that the replacement model is linear."""
    nn_model, chosen, graph = graph_of(name, kind)
    step, logit = 1e-6, int(graph.of_kind("logit")[0])
    for number in some(graph):
        found = graph.intervene({number: 1 + step}, nn_model, chosen, mlps="transcoders")
        at = graph.is_target
        close(found.measured[at] / step, found.predicted[at] / step, 1e-4)
        paths = path_sums(graph, logit)[number]
        assert float(found.predicted[logit]) / step == pytest.approx(float(paths), rel=1e-5)


def test_path_sums_are_the_matrix_power_series() -> None:
    """(I - B)^-1 by hand, B being edges per unit of the target's own value."""
    _, _, graph = graph_of("llama", "cross-layer")
    value = torch.where(graph.value != 0, graph.value, 1.0)
    passes = (graph.adjacency() / value[:, None]).masked_fill(~graph.is_target[:, None], 0)
    series = torch.linalg.inv(torch.eye(graph.n_nodes).double() - passes)
    targets = [int(graph.of_kind("logit")[-1]), int(graph.of_kind("feature")[-1])]
    for target in targets:
        expected = series[target] * value[target]
        expected[target] = 0
        torch.testing.assert_close(path_sums(graph, target), expected)


def test_several_changes_at_once_and_a_layer_that_is_held() -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    first, last = graph.of_kind("feature")[0].item(), graph.of_kind("feature")[-1].item()
    found = graph.intervene({first: 1 + 1e-6, last: 0.5}, nn_model, chosen, mlps="transcoders")
    assert float(found.after[last]) == pytest.approx(0.5 * float(graph.value[last]))
    at = graph.is_target
    close(found.measured[at], found.predicted[at], 1e-6)
    layer = int(graph.layer[first]) + 1
    held = graph.intervene(
        {first: 1 + 1e-6}, nn_model, chosen, mlps="transcoders", constrained=[layer]
    )
    close(held.measured[at], held.predicted[at], 1e-4)
    free = graph.intervene({first: 1 + 1e-6}, nn_model, chosen, mlps="transcoders")
    logit = int(graph.of_kind("logit")[0])
    assert float(held.measured[logit]) != pytest.approx(float(free.measured[logit]), rel=1e-3)


# -- the real model ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_with_nothing_frozen_it_is_what_attach_does(name: str, kind: str) -> None:
    nn_model, chosen, graph = graph_of(name, kind)
    replaced = attach(nn_model, chosen, mode="replace+error")
    numbers = some(graph, 3)
    wanted = dict(zip(numbers, (0.0, 2.0, -1.0), strict=True))
    found = graph.intervene(wanted, nn_model, chosen, freeze_attention=False)
    nodes = {layer: [] for layer in chosen.layers}
    for number, factor in wanted.items():
        nodes[int(graph.layer[number])].append((graph.node(number), factor))
    with torch.no_grad():
        with replaced.trace(torch.tensor([IDS])):
            for layer in chosen.layers:
                for node, factor in nodes[layer]:
                    replaced.transcoders[layer].features.output[0, node.position, node.index] = (
                        factor * float(graph.value[node.number])
                    )
            logits = replaced.get(resolve_sites(nn_model).unembed).output.save()
            capped = replaced.output.logits.save()
    close(found.logits_after, logits[0, -1], 1e-6)
    close(found.probabilities_after, capped[0, -1].softmax(-1), 1e-6)
    assert float((found.logits_after - found.logits_before).norm()) > 1e-3


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["llama", "mixtral", "falcon"])
def test_a_factor_of_one_changes_nothing(name: str, frozen: bool) -> None:
    nn_model, chosen, graph = graph_of(name, "skip")
    found = graph.intervene({some(graph)[0]: 1}, nn_model, chosen, freeze_attention=frozen)
    at = graph.is_target
    assert float(found.measured[at].abs().max()) < 1e-9
    close(found.before[graph.kind == 0], graph.value[graph.kind == 0])
    logits = graph.of_kind("logit")
    close(found.before[logits], graph.total[logits])


def test_frozen_attention_stays_and_unfrozen_responds() -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    number = some(graph)[0]
    frozen, free = (
        graph.intervene({number: -20}, nn_model, chosen, freeze_attention=f) for f in (True, False)
    )
    assert float((frozen.logits_after - free.logits_after).norm()) > 1e-2


def test_half_precision() -> None:
    chosen = transcoders("llama", "skip", torch.float32)
    nn_model = model("llama", torch.bfloat16)
    graph = attribute(nn_model, chosen, IDS)
    number = some(graph)[1]
    found = graph.intervene({number: -99}, nn_model, chosen, constrained=ALL)
    at = graph.of_kind("logit")
    close(found.measured[at], -100 * graph.adjacency()[at, number].double(), 0.05)


def test_directions_as_targets() -> None:
    nn_model, chosen = model("llama", torch.float64), transcoders("llama", "skip", torch.float64)
    direction = torch.randn(zoo.D_MODEL, dtype=torch.float64)
    graph = attribute(nn_model, chosen, IDS, targets=[("way", direction)])
    number, logit = some(graph)[0], int(graph.of_kind("logit")[0])
    with pytest.raises(InputError, match="directions="):
        graph.intervene({number: 0}, nn_model, chosen)
    found = graph.intervene(
        {number: 0}, nn_model, chosen, constrained=ALL, directions={"way": direction}
    )
    edge = float(graph.adjacency()[logit, number])
    assert float(found.measured[logit]) == pytest.approx(-edge, rel=1e-4, abs=1e-9)


# -- names ---------------------------------------------------------------------------------------


def test_nodes_are_named_by_number_id_node_tuple_and_supernode() -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    a, b, c = some(graph, 3)
    graph = graph.named(supernodes={"pair": [a, graph.node(b).id]}, labels={c: "third"})
    assert graph.metadata["supernodes"] == {"pair": [graph.node(a).id, graph.node(b).id]}
    reference = graph.intervene({a: 0, b: 0, c: 2}, nn_model, chosen)
    for changes in (
        {"pair": 0, c: 2},
        {(a, b): 0, graph.node(c).id: 2},
        {graph.node(a): 0, b: 0, c: 2},
    ):
        found = graph.intervene(changes, nn_model, chosen)
        assert found.factors == reference.factors
        assert torch.equal(found.logits_after, reference.logits_after)
    assert "x0" in repr(reference)
    assert len(reference.top_tokens(nn_model, 3)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to change"),
        ({"9_9_9": 0}, "no node of this graph"),
        ({0: float("nan")}, "no factor"),
        ({0: "0"}, "no factor"),
        ({0: True}, "no factor"),
        ({0: 0, (0,): 1}, "named twice"),
        ({-1: 0}, "is a target"),
        ({10**9: 0}, "the graph has nodes"),
        ({1.5: 0}, "by its number"),
    ],
)
def test_changes_that_cannot_be(changes: dict[Any, Any], message: str) -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    with pytest.raises(InputError, match=message):
        graph.intervene(changes, nn_model, chosen)


def test_models_and_sets_that_do_not_fit() -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    with pytest.raises(MismatchError, match="not the model or the transcoder set"):
        graph.intervene({0: 0}, nn_model, transcoders("llama", "skip", torch.float64))
    with pytest.raises(InputError, match="attached"):
        graph.intervene({0: 0}, attach(nn_model, chosen), chosen)
    with pytest.raises(InputError, match="layers 0 to"):
        graph.intervene({0: 0}, nn_model, chosen, constrained=[99])
    with pytest.raises(InputError, match="unknown mlps"):
        graph.intervene({0: 0}, nn_model, chosen, mlps="neurons")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token ids"):
        replace(graph, token_ids=(-1, *graph.token_ids[1:])).intervene({0: 0}, nn_model, chosen)
    with pytest.raises(MismatchError, match="the set has 0 there"):
        last = graph.of_kind("feature")[-1].item()
        graph.intervene({last: 0}, nn_model, chosen.subset([0]))


def test_supernodes_without_members() -> None:
    _, _, graph = graph_of("llama", "per-layer")
    with pytest.raises(InputError, match="has no nodes"):
        graph.named(supernodes={"empty": []})
    with pytest.raises(InputError, match="the name of a node"):
        graph.named(supernodes={graph.node(0).id: [1]})
    with pytest.raises(InputError, match="no node of this graph"):
        graph.named(pinned=["nowhere"])


# -- tables --------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    predicted = torch.tensor([1.0, 2.0, 2.0, -4.0])
    measured = torch.tensor([3.0, 1.0, 5.0, -1.0])
    found = agreement(predicted, measured)
    # Ranks 1, 2.5, 2.5, 0 and 2, 1, 3, 0, each minus 1.5: covariance over the norms.
    expected = (-0.5 * 0.5 + 1 * -0.5 + 1 * 1.5 + 1.5 * 1.5) / (4.5 * 5.0) ** 0.5
    assert found.spearman == pytest.approx(expected)
    assert found.sign == 1.0
    assert agreement(-predicted, measured).sign == 0.0
    assert agreement(torch.zeros(3), torch.ones(3)).spearman != 0  # NaN


def test_a_prediction_of_features_that_are_held_stops_there() -> None:
    _, _, graph = graph_of("llama", "per-layer")
    factors = torch.full((1, graph.n_nodes), float("nan"))
    number = graph.of_kind("feature")[0].item()
    factors[0, number] = 0.0
    all_held = predicted_changes(graph, factors, ALL)[0]
    at = graph.is_target & (torch.arange(graph.n_nodes) != number)
    torch.testing.assert_close(all_held[at], -graph.adjacency()[at, number].double())


@cache
def builtin(name: str) -> tuple[Any, TranscoderSet]:
    path = builtin_model_path()
    nn_model = nnsight.TransformersModel(path, task="text-generation", dispatch=True)
    return nn_model, TranscoderSet.from_pretrained(f"builtin/{name}")


@pytest.mark.parametrize("name", ["per-layer", "skip", "clt"])
def test_the_builtin_models_graphs_predict_what_interventions_do(name: str) -> None:
    """With attention frozen, the top 50 features of pruned graphs: sign agreement over 90 % and
    Spearman over 0.8, as means over prompts, whether transcoders or the model's own MLPs answer;
    better than activations alone, and than chance."""
    nn_model, chosen = builtin(name)
    tables, direct, mlps = [], [], []
    for task in ("agreement", "two-hop", "induction"):
        for example in examples(task, "held_out", 2, 0):
            graph = attribute(nn_model, chosen, example.prompt)
            table = predicted_vs_measured(graph, nn_model, chosen, top=50, mlps="transcoders")
            tables.append(table)
            mlps.append(predicted_vs_measured(graph, nn_model, chosen, top=50).agreement)
            held = predicted_vs_measured(graph, nn_model, chosen, top=50, constrained=range(4))
            direct.append(held.agreement)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert mean([t.agreement.sign for t in tables]) > 0.9
    spearman = mean([t.agreement.spearman for t in tables])
    assert spearman > 0.8
    activation = mean([t.baselines["activation"].spearman for t in tables])
    chance = mean([t.baselines["random"].spearman for t in tables])
    assert spearman > max(activation, chance) + 0.2
    assert min(found.sign for found in direct) == 1.0
    assert min(found.spearman for found in direct) > 0.99
    assert mean([found.sign for found in mlps]) > 0.9
    assert mean([found.spearman for found in mlps]) > 0.8


def test_a_table() -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    table = predicted_vs_measured(graph, nn_model, chosen, top=5, factor=2.0)
    assert len(table) == len(table.rows()) <= 5
    assert table.node == tuple(top_features(graph, 5))
    assert json.loads(json.dumps(table.rows()))[0]["id"] == graph.node(table.node[0]).id
    assert "Spearman" in repr(table)
    target = graph.of_kind("feature")[-1].item()
    other = predicted_vs_measured(graph, nn_model, chosen, nodes=[0, 1], target=target)
    assert other.node == (0, 1)
    assert other.target == graph.label(target)
    nodes = [graph.of_kind(kind)[-1].item() for kind in ("error", "token")]
    mixed = predicted_vs_measured(graph, nn_model, chosen, nodes=nodes, constrained=ALL)
    close(mixed.measured, mixed.predicted)
    with pytest.raises(InputError, match="no inputs"):
        predicted_vs_measured(graph, nn_model, chosen, target=graph.of_kind("token")[0].item())
    with pytest.raises(InputError, match="no features"):
        predicted_vs_measured(graph, nn_model, chosen, nodes=[])


def test_the_example_writes_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "examples" / "predicted_vs_measured.py"
    spec = importlib.util.spec_from_file_location("predicted_vs_measured_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "SETS", ("clt",))
    monkeypatch.setattr(example, "TASKS", ("two-hop",))
    out = tmp_path / "effects.json"
    monkeypatch.setattr(sys, "argv", ["x", "--prompts", "1", "--top", "4", "--out", str(out)])
    example.main()
    records = json.loads(out.read_text())
    assert [record["setting"] for record in records] == list(example.SETTINGS)
    assert all(len(record["rows"]) == 4 for record in records)
    assert capsys.readouterr().out.count("| clt |") == len(example.SETTINGS)


def test_attention_that_cannot_be_written_down_is_said_so() -> None:
    nn_model, chosen, graph = graph_of("llama", "per-layer")
    sites = resolve_sites(nn_model)
    layers = tuple(replace(layer, value=None) for layer in sites.layers)
    broken = replace(sites, layers=layers)
    with pytest.raises(SiteError, match="cannot be"):
        graph.intervene({0: 0}, nn_model, chosen, sites=broken)
    found = graph.intervene({0: 0}, nn_model, chosen, sites=broken, freeze_attention=False)
    assert found.measured[graph.is_target].isfinite().all()

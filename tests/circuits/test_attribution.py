"""``attribute``: completeness, the autograd oracle, brute force, and bad input."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
import zoo
from setups import IDS, engine, model, relative, run, transcoders

from nnsight_transcoders import TranscoderSet, attribute
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.autograd import AutogradEngine
from nnsight_transcoders.circuits.graph import FEATURE
from nnsight_transcoders.errors import InputError, MismatchError, SiteError
from nnsight_transcoders.sites import resolve_sites

KINDS = ["per-layer", "skip", "cross-layer"]
SITES = [("N1", "O"), ("R", "O'"), ("N0", "O'")]


def graph(name: str, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = options.pop("config", {})
    return attribute(model(name, dtype), transcoders(name, kind, dtype, **config), IDS, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_complete_and_equal_to_the_oracle(name: str, kind: str) -> None:
    ours, oracle = graph(name, kind), graph(name, kind, method="autograd")
    assert ours.metadata["method"] == "operator"
    assert oracle.metadata["method"] == "autograd"
    assert ours.completeness_error < 1e-4
    assert oracle.completeness_error < 1e-4
    assert relative(ours.adjacency(), oracle.adjacency()) < 1e-5
    assert relative(ours.bias, oracle.bias) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_complete_in_float64(name: str, kind: str) -> None:
    ours = graph(name, kind, torch.float64)
    assert ours.weight.dtype == torch.float64
    assert ours.completeness_error < 1e-6


@pytest.mark.parametrize(("input_site", "output_site"), SITES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox", "falcon-new", "opt"])
def test_every_site(name: str, kind: str, input_site: str, output_site: str) -> None:
    config = {"input_site": input_site, "output_site": output_site}
    ours = graph(name, kind, config=config)
    oracle = graph(name, kind, config=config, method="autograd")
    assert ours.completeness_error < 1e-4
    assert relative(ours.adjacency(), oracle.adjacency()) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"activation": "jumprelu"},
        {"activation": "batchtopk"},
        {"activation": "topk", "k": 5},
        {"activation": "topk", "k": 5, "relu_first": False},
        {"activation": "grouptopk", "k": 2, "n_groups": 4},
        {"leading_positions": 1},
    ],
)
def test_every_activation(config: dict[str, Any]) -> None:
    ours = graph("llama", "per-layer", config=config)
    assert ours.completeness_error < 1e-4
    features = ours.kind == FEATURE
    if "k" in config:
        per_position = config["k"] * config.get("n_groups", 1)
        assert features.sum() <= per_position * len(IDS) * zoo.N_LAYERS
    if "leading_positions" in config:
        assert ours.position[features].min() == 1


def test_layers_without_a_transcoder_are_errors() -> None:
    chosen = transcoders("llama", "per-layer").subset([1])
    ours = attribute(model("llama"), chosen, IDS)
    assert ours.completeness_error < 1e-4
    assert set(ours.layer[ours.kind == FEATURE].tolist()) == {1}
    assert len(ours.of_kind("error")) == zoo.N_LAYERS * len(IDS)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_edges_equal_finite_perturbations(name: str) -> None:
    """Brute force: move one source in the model frozen in place, watch every target."""
    sites, the_run = run(name, torch.float64)
    chosen = transcoders(name, "cross-layer", torch.float64)
    oracle = AutogradEngine(
        model(name, torch.float64), model(name, torch.float64)._module, sites, the_run, chosen
    )
    ours = attribute(model(name, torch.float64), chosen, IDS)
    adjacency = ours.adjacency()
    base = [read.detach() for read in oracle._reads]
    features = ours.of_kind("feature").tolist()
    for number in features[:: len(features) // 8]:
        node = ours.node(number)
        row = chosen.rows(node.layer, [node.index])[0].double() * node.value
        leaves = [leaf.detach().clone() for leaf in oracle._leaves]
        for j, target in enumerate(chosen.targets(node.layer)):
            leaves[target][node.position] += row[j]
        moved = oracle._run_frozen(oracle._start.detach(), leaves, grad=False)
        for other in features[:: len(features) // 20]:
            target = ours.node(other)
            encoder = chosen.rows(target.layer, [target.index], "encoder")[0].double()
            change = (moved[target.layer] - base[target.layer])[target.position] @ encoder
            assert float(change) == pytest.approx(
                float(adjacency[other, number]), rel=1e-5, abs=1e-9
            )


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_in_the_frozen_model_is_the_edge(kind: str) -> None:
    frozen, active = engine("gpt2", kind, torch.float64)
    chosen = transcoders("gpt2", kind, torch.float64)
    ours = attribute(model("gpt2", torch.float64), chosen, IDS)
    adjacency = ours.adjacency()
    for number in ours.of_kind("feature").tolist()[::40]:
        node = ours.node(number)
        row = chosen.rows(node.layer, [node.index])[0].view(-1, zoo.D_MODEL) * node.value
        outputs: list[Any] = [None] * zoo.N_LAYERS
        for j, target in enumerate(chosen.targets(node.layer)):
            outputs[target] = torch.zeros(len(IDS), zoo.D_MODEL, dtype=torch.float64)
            outputs[target][node.position] = -row[j]
        zero = torch.zeros(len(IDS), zoo.D_MODEL, dtype=torch.float64)
        change = frozen.frozen.replay(zero, outputs, constants=False)
        for layer, features in active.layers.items():
            pre = (change.reads[layer][features.position] * features.encoder[features.row]).sum(-1)
            targets = ((ours.kind == FEATURE) & (ours.layer == layer)).nonzero().flatten()
            assert torch.allclose(pre, -adjacency[targets, number], atol=1e-10)


def test_logit_rows_sum_to_the_demeaned_logits() -> None:
    ours = graph("gemma2", "per-layer", max_n_logits=4, desired_logit_prob=1.0)
    nn_model = model("gemma2")
    with torch.no_grad():
        with nn_model.trace(torch.tensor([IDS])):
            logits = nn_model.lm_head.output.detach().save()
    last = logits[0, -1]
    for number in ours.of_kind("logit").tolist():
        node = ours.node(number)
        assert float(ours.total[number]) == pytest.approx(
            float(last[node.index] - last.mean()), rel=1e-4
        )
        assert node.value == pytest.approx(float(last[node.index]), rel=1e-5)


def test_no_edge_from_a_later_layer_or_position() -> None:
    for name in ("gpt2", "gpt-neox"):
        ours = graph(name, "per-layer")
        assert (ours.position[ours.source] <= ours.position[ours.target]).all()
        features = (ours.kind[ours.source] == FEATURE) & (ours.kind[ours.target] == FEATURE)
        assert (ours.layer[ours.source] < ours.layer[ours.target])[features].all()


def test_limited_nodes_close_with_omitted() -> None:
    whole = graph("llama", "per-layer")
    part = graph("llama", "per-layer", max_feature_nodes=20)
    assert len(part.of_kind("feature")) == 20
    assert part.completeness_error < 1e-4
    assert part.omitted.abs().max() > 0
    assert whole.omitted.abs().max() == 0
    # The chosen ones are, by and large, the most influential of the whole graph.
    influence = whole.influence().masked_fill(whole.kind != FEATURE, 0)
    best = {whole.node(int(i)).id for i in influence.topk(20).indices}
    found = {part.node(int(i)).id for i in part.of_kind("feature")}
    assert len(best & found) >= 14


def test_batch_size_does_not_matter() -> None:
    whole = graph("gpt2", "skip")
    tiny = graph("gpt2", "skip", memory=100_000)
    assert relative(tiny.adjacency(), whole.adjacency()) < 1e-5


def test_half_precision_models_attribute_in_float32() -> None:
    nn_model = zoo.nnsight_model("llama", dtype=torch.bfloat16)
    ours = attribute(nn_model, transcoders("llama", "per-layer"), IDS)
    assert ours.weight.dtype == torch.float32
    assert ours.metadata["model_dtype"] == "bfloat16"
    assert ours.completeness_error < 0.3


def test_sdpa_models_are_run_eagerly_and_put_back() -> None:
    nn_model = zoo.nnsight_model("llama", attention="sdpa")
    assert attribute(nn_model, transcoders("llama", "per-layer"), IDS).completeness_error < 1e-4
    assert nn_model._module.config._attn_implementation == "sdpa"


def test_targets_as_tokens_ids_and_directions() -> None:
    nn_model, chosen = model("llama"), transcoders("llama", "per-layer")
    by_text = attribute(nn_model, chosen, "w40 w7 w23", targets=["w12", "w30"])
    by_id = attribute(nn_model, chosen, [40, 7, 23], targets=[12, 30])
    assert by_text.target_names == by_id.target_names == ("w12", "w30")
    assert torch.equal(by_text.weight, by_id.weight)
    weight = nn_model._module.lm_head.weight.detach()
    difference = attribute(
        nn_model, chosen, [40, 7, 23], targets=[("w12 - w30", weight[12] - weight[30])]
    )
    assert difference.completeness_error < 1e-4
    logits = by_id.of_kind("logit")
    expected = by_id.value[logits[0]] - by_id.value[logits[1]]
    assert float(difference.value[difference.of_kind("logit")[0]]) == pytest.approx(
        float(expected), rel=1e-3
    )


def test_targets_at_another_position() -> None:
    ours = graph("llama", "per-layer", position=2)
    assert ours.completeness_error < 1e-4
    assert set(ours.position[ours.of_kind("logit")].tolist()) == {2}


def test_works_on_a_plain_nnsight_wrapper() -> None:
    bare = nnsight.NNsight(zoo.hf_model("gpt2"))
    ours = attribute(bare, transcoders("gpt2", "per-layer"), IDS)
    assert ours.completeness_error < 1e-4
    assert ours.tokens[1] == "<40>"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ([1] * (zoo.CONTEXT + 1), {}, f"takes {zoo.CONTEXT} at most"),
        ([1, zoo.VOCAB], {}, f"token id {zoo.VOCAB} is outside"),
        ([1, -1], {}, "token id -1 is outside"),
        ([[1, 2], [3, 4]], {}, "one prompt at a time"),
        (IDS, {"max_feature_nodes": 0}, "max_feature_nodes"),
        (IDS, {"max_n_logits": 0}, "max_n_logits"),
        (IDS, {"desired_logit_prob": 1.5}, "desired_logit_prob"),
        (IDS, {"position": 7}, "position 7"),
        (IDS, {"targets": []}, "targets is empty"),
        (IDS, {"targets": ["w3 w4"]}, "a target is one token"),
        (IDS, {"targets": [zoo.VOCAB]}, "outside the vocabulary"),
        (IDS, {"targets": [("x", torch.zeros(3))]}, "has shape"),
        (IDS, {"method": "magic"}, "unknown method"),
    ],
)
def test_bad_input(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attribute(model("llama"), transcoders("llama", "per-layer"), prompt, **options)


def test_a_set_of_another_model_is_refused() -> None:
    sites, the_run = run("llama")
    wide = TranscoderSet.from_transcoders(
        {
            0: random_transcoders(the_run, "per-layer")[0].__class__(
                transcoders("llama", "per-layer").config(0).replace(d_in=48, d_out=48)
            )
        }
    )
    with pytest.raises(MismatchError, match="d_in=48.*d_model=32"):
        attribute(model("llama"), wide, IDS)


def test_a_wrong_reading_of_the_architecture_is_caught() -> None:
    wrong = resolve_sites(model("llama"), parallel=True)
    with pytest.raises(SiteError, match="model.layers.0"):
        attribute(
            model("llama"), transcoders("llama", "per-layer"), IDS, sites=wrong, method="operator"
        )


def test_attention_that_cannot_be_written_down_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """A value projection with a nonlinearity inside is no frozen linear map: autograd serves."""
    module = zoo.hf_model("llama")
    for layer in module.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _x, out: torch.tanh(out) * out)
    nn_model = nnsight.NNsight(module)
    chosen = transcoders("llama", "per-layer")
    with pytest.raises(SiteError, match="pattern x values x output"):
        attribute(nn_model, chosen, IDS, method="operator")
    with caplog.at_level("WARNING"):
        ours = attribute(nn_model, chosen, IDS)
    assert ours.metadata["method"] == "autograd"
    assert "falling back to autograd" in caplog.text

"""``attach`` on every architecture, for every kind of transcoder and every site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import nnsight
import pytest
import torch
import transformers
import zoo
from attach_support import (
    IDS,
    Reference,
    distance,
    logits_of,
    model,
    original_logits,
    run_of,
    transcoders,
)
from test_sites import EXPECTED
from torch import nn
from torch.overrides import TorchFunctionMode

from nnsight_transcoders.attachment.edit import attach
from nnsight_transcoders.check import Kind, random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import resolve_sites

KINDS = get_args(Kind)


def cases() -> list:
    """Architecture, kind and sites; O' only where it differs, N0 only where there is a norm."""
    found = []
    for name in zoo.ARCHITECTURES:
        inputs = ["N1", "R"] + (["N0"] if EXPECTED[name].mlp_norm else [])
        outputs = ["O"] + (["O'"] if EXPECTED[name].mlp_post_norm else [])
        found += [
            pytest.param(name, kind, read, write, id=f"{name}-{kind}-{read}-{write}")
            for kind in KINDS
            for read in inputs
            for write in outputs
        ]
    return found


# -- the three modes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "read", "write"), cases())
def test_reconstruction_plus_error_leaves_the_logits(name, kind, read, write):
    chosen = transcoders(name, kind, read, write)
    replaced = attach(model(name), chosen, mode="replace+error")
    with torch.no_grad(), replaced.trace(IDS[None]):
        errors = [replaced.transcoders[layer].error.output.norm() for layer in chosen.layers]
        smallest = torch.stack(errors).min().save()
        logits = replaced.output.logits[0].save()
    assert distance(logits, original_logits(name)) <= 1e-4
    assert smallest > 0


@pytest.mark.parametrize(("name", "kind", "read", "write"), cases())
def test_replace_equals_hooks_on_a_copy(name, kind, read, write):
    chosen = transcoders(name, kind, read, write)
    expected = Reference(name, chosen).output()[0]
    assert distance(logits_of(attach(model(name), chosen)), expected) <= 1e-4
    assert distance(expected, original_logits(name)) > 1e-3


@pytest.mark.parametrize(("name", "kind", "read", "write"), cases())
def test_observe_shows_the_features_of_the_sites_value(name, kind, read, write):
    chosen = transcoders(name, kind, read, write)
    reference = Reference.observing(name, chosen)
    replaced = attach(model(name), chosen, mode="observe")
    found: dict[str, list] = {"features": [], "reconstruction": [], "error": []}
    with torch.no_grad(), replaced.trace(IDS[None]):
        for layer in chosen.layers:
            node = replaced.transcoders[layer]
            found["features"].append(node.features.output[0])
            found["reconstruction"].append(node.reconstruction.output[0])
            found["error"].append(node.error.output[0])
        nnsight.save(found)
        logits = replaced.output.logits[0].save()
    assert torch.equal(logits, original_logits(name))
    for i, layer in enumerate(chosen.layers):
        reconstruction = reference.reconstruction(layer)
        assert distance(found["features"][i], reference.encoded(layer)) <= 1e-4
        assert distance(found["reconstruction"][i], reconstruction) <= 1e-4
        assert distance(found["error"][i], reference.y[layer] - reconstruction) <= 1e-4


@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk", "grouptopk"])
def test_every_activation_function(activation, mode):
    options = {"topk": {"k": 4, "relu_first": False}, "grouptopk": {"k": 2, "n_groups": 4}}
    chosen = transcoders("llama", activation=activation, **options.get(activation, {}))
    reference = Reference("llama", chosen, outputs={0: lambda y, _: y})
    replaced = attach(model("llama"), chosen, mode=mode)
    with torch.no_grad(), replaced.trace(IDS[None]):
        features = replaced.transcoders[0].features.output[0].save()
        logits = replaced.output.logits[0].save()
    reference.output()
    assert distance(features, chosen[0].encode(reference.x[0])) <= 1e-5
    assert distance(logits, original_logits("llama")) <= 1e-4 or mode == "replace"


@pytest.mark.parametrize("layers", [[1], [0, 2], [2, 0]])
def test_some_layers_only(layers):
    chosen = transcoders("gpt2", "skip")
    expected = Reference("gpt2", chosen.subset(layers)).output()[0]
    replaced = attach(model("gpt2"), chosen, layers)
    assert distance(logits_of(replaced), expected) <= 1e-4
    assert list(replaced.transcoders._module) == [str(layer) for layer in sorted(layers)]


# -- what is computed ----------------------------------------------------------------------------


class _Uses(TorchFunctionMode):
    """Counts the torch operations that some parameters take part in."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._ids, self.count = {id(p) for p in parameters}, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if isinstance(result, torch.Tensor):  # not merely its shape or dtype
            self.count += any(id(arg) in self._ids for arg in (*args, *kwargs.values()))
        return result


def mlp_parameters(name: str) -> list[nn.Parameter]:
    """The parameters of all MLPs."""
    blocks = model(name)._module.get_submodule(EXPECTED[name].blocks)
    owners = ["fc1", "fc2"] if name == "opt" else ["mlp"]
    return [p for block in blocks for o in owners for p in block.get_submodule(o).parameters()]


@contextmanager
def uses_of_the_mlp(name: str) -> Iterator[_Uses]:
    """How often an MLP parameter is used in the block."""
    with _Uses(mlp_parameters(name)) as uses:
        yield uses


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_a_replaced_mlp_is_not_computed(name):
    for write in ["O"] + (["O'"] if EXPECTED[name].mlp_post_norm else []):
        chosen = transcoders(name, "per-layer", "N1", write)
        replaced = attach(model(name), chosen)
        with uses_of_the_mlp(name) as uses:
            logits_of(replaced)
        assert uses.count == 0
        with uses_of_the_mlp(name) as uses:
            logits_of(attach(model(name), chosen, mode="replace+error"))
        assert uses.count >= 2 * zoo.N_LAYERS


@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
def test_a_forward_hook_inside_the_mlp_runs_only_where_the_mlp_does(mode):
    replaced = attach(model("llama"), transcoders("llama"), [0, 2], mode=mode)
    calls = []
    handles = [
        layer.mlp.up_proj.register_forward_hook(lambda *_, n=number: calls.append(n))
        for number, layer in enumerate(model("llama")._module.model.layers)
    ]
    try:
        logits_of(replaced)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ([1] if mode == "replace" else [0, 1, 2])


@pytest.mark.parametrize("mode", ["replace", "observe"])
def test_the_encoder_runs_once_per_layer(mode):
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen, mode=mode)
    with _Uses([chosen[layer].W_enc for layer in chosen.layers]) as uses:
        logits_of(replaced)
    assert uses.count == len(chosen.layers)


# -- sites given by hand, and models outside the zoo ---------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "replace+error"])
def test_an_output_site_inside_the_mlp(mode):
    sites = resolve_sites(model("llama"), mlp_out="model.layers.{layer}.mlp.down_proj")
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen, mode=mode, sites=sites)
    if mode == "replace":
        expected = Reference("llama", chosen).output()[0]
    else:
        expected = original_logits("llama")
    assert distance(logits_of(replaced), expected) <= 1e-4


@pytest.mark.parametrize("whole_mlp", [True, False])
@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
def test_an_mlp_that_returns_more_than_its_output(mode, whole_mlp):
    """GPT-OSS's MLP gives its router's scores as well."""
    config = transformers.GptOssConfig(
        **{**zoo._MOE, "head_dim": 16, "num_local_experts": 4, "sliding_window": 4}
    )
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    envoy = nnsight.NNsight(module)
    sites = resolve_sites(module)
    assert sites.layers[1].mlp_out == "model.layers.1.mlp.experts"
    chosen = random_transcoders(collect(envoy, sites, IDS), "per-layer")
    if whole_mlp:
        sites = resolve_sites(module, mlp_out="model.layers.{layer}.mlp")
    if whole_mlp and mode == "replace":
        return  # its output cannot be made up without running it
    found = logits_of(attach(envoy, chosen, mode=mode, sites=sites))
    expected = logits_of(envoy)
    if mode != "replace":
        assert distance(found, expected) <= 1e-4
        return
    handles = [
        layer.mlp.register_forward_hook(lambda _, x, y, t=chosen[i]: (t(x[0]), y[1]))
        for i, layer in enumerate(module.model.layers)
    ]
    reference = logits_of(envoy)
    for handle in handles:
        handle.remove()
    assert distance(found, reference) <= 1e-4
    assert distance(found, expected) > 1e-3


def test_site_n0_needs_a_norm_before_the_mlp():
    chosen = transcoders("olmo2", "per-layer", "N0")
    with pytest.raises(InputError, match=r"N0.*model\.layers\.0 has no"):
        attach(model("olmo2"), chosen)


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", ["N1", "N0"])
def test_reconstruction_plus_error_is_exact_in_half_precision_too(kind, weights, read):
    envoy = zoo.nnsight_model("llama", dtype=torch.bfloat16)
    run = collect(envoy, resolve_sites(envoy), IDS)
    chosen = random_transcoders(run, kind, dtype=weights, input_site=read)
    replaced = attach(envoy, chosen, mode="replace+error")
    assert torch.equal(logits_of(replaced), logits_of(envoy))
    assert logits_of(attach(envoy, chosen)).dtype == torch.bfloat16


def test_a_double_precision_model_stays_in_double_precision():
    envoy = zoo.nnsight_model("gpt2", dtype=torch.float64)
    run = collect(envoy, resolve_sites(envoy), IDS)
    chosen = random_transcoders(run, "per-layer", input_site="N0")
    replaced = attach(envoy, chosen, mode="observe")
    with torch.no_grad(), replaced.trace(IDS[None]):
        residual = replaced.transformer.h[0].ln_2.input[0].save()
        features = replaced.transcoders[0].features.output[0].save()
    centred = residual - residual.mean(-1, keepdim=True)
    x = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert distance(features, chosen[0].encode(x)) <= 1e-13


def test_the_runs_values_are_the_same_where_run_of_and_the_reference_read_them():
    """The scale of the random sets comes from ``collect``; here it is compared with hooks."""
    reference = Reference.observing("gemma2", transcoders("gemma2", "per-layer", "R", "O'"))
    assert distance(run_of("gemma2").mid[1], reference.x[1]) <= 1e-6
    assert distance(run_of("gemma2").mlp_post[1], reference.y[1]) <= 1e-6

"""What ``attach``, ``detach``, ``attached`` and ``attribute`` leave behind: nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import zoo
from attach_support import IDS, PROMPT, WIDTH, distance, logits_of, model, run_of, transcoders
from torch import Tensor, nn

from nnsight_transcoders.attachment.edit import ablate, attach, attached, detach
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.attribution import attribute
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.errors import InputError, MismatchError, SiteError
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import resolve_sites

# Gemma 2 has no other form of attention.
FORMS = [("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager"), ("falcon", "sdpa")]


def state(envoy: Any) -> dict[str, Any]:
    """Everything about a model that could be left changed."""
    module: nn.Module = envoy._module
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, id(child)) for name, child in module.named_modules()],
        "classes": [type(child) for child in module.modules()],
        "parameters": [
            (name, p.data_ptr(), p.requires_grad, p.dtype, p.grad is None)
            for name, p in module.named_parameters()
        ],
        "buffers": [name for name, _ in module.named_buffers()],
        "hooks": [sum(len(getattr(c, name)) for name in hooks) for c in module.modules()],
        "training": [child.training for child in module.modules()],
        "attention": [
            child.config._attn_implementation
            for child in module.modules()
            if hasattr(getattr(child, "config", None), "_attn_implementation")
        ],
        "envoys": [(path, id(child)) for path, child in envoy.named_modules()],
        "children": [id(child) for child in envoy._children],
        "attributes": sorted(envoy.__dict__),
        "edits": list(envoy._edits),
        "mediators": list(envoy.interleaver.mediators),
        "interleaving": envoy.interleaver.interleaving,
        "grad": torch.is_grad_enabled(),
    }


def values(envoy: Any) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: weight.clone() for name, weight in envoy._module.state_dict().items()}


def assert_unchanged(envoy: Any, before: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The model is exactly as it was."""
    after = state(envoy)
    for name, value in before.items():
        assert after[name] == value, name
    assert weights.keys() == envoy._module.state_dict().keys()
    for name, weight in envoy._module.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def use(replaced: Any) -> None:
    """Trace, edit, differentiate and generate."""
    with replaced.trace(IDS[None]):
        features = replaced.transcoders[1].features.output
        replaced.transcoders[2].features.output[:, -1] = 1.0
        loss = replaced.output.logits[0, -1, 5] + features.sum()
        with loss.backward():
            features.grad.save()
    replaced._module.zero_grad()
    with replaced.generate(PROMPT, max_new_tokens=2, do_sample=False) as tracer:
        tracer.result.save()
    logits_of(replaced)


# -- attach and detach ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
@pytest.mark.parametrize(("name", "attention"), [*FORMS, ("llama", "eager")])
def test_the_model_is_as_it_was_while_attached_and_after(name, attention, mode):
    envoy = zoo.nnsight_model(name, attention=attention)
    envoy._module.requires_grad_(False)
    envoy._module.get_input_embeddings().weight.requires_grad_()
    chosen, logits = transcoders(name, "cross-layer"), logits_of(envoy)
    before, weights = state(envoy), values(envoy)
    replaced = attach(envoy, chosen, mode=mode)
    assert_unchanged(envoy, before, weights)
    use(replaced)
    assert_unchanged(envoy, before, weights)
    assert torch.equal(logits_of(envoy), logits)
    assert detach(replaced) is replaced
    assert torch.equal(logits_of(replaced), logits)
    assert "transcoders" not in repr(replaced)
    del replaced
    assert_unchanged(envoy, before, weights)
    assert torch.equal(logits_of(envoy), logits)


def test_two_attached_copies_do_not_disturb_each_other_or_the_original():
    envoy, chosen = zoo.nnsight_model("llama"), transcoders("llama")
    logits = logits_of(envoy)
    one, two = attach(envoy, chosen), attach(envoy, chosen, [1], mode="replace+error")
    first = logits_of(one)
    assert distance(logits_of(two), logits) <= 1e-5
    assert torch.equal(logits_of(one), first)
    assert torch.equal(logits_of(envoy), logits)
    detach(one)
    assert torch.equal(logits_of(one), logits)
    with torch.no_grad(), two.trace(IDS[None]):
        features = two.transcoders[1].features.output.save()
    assert features.shape == (1, len(IDS), WIDTH)


def test_an_attached_copy_is_of_the_models_class_and_knows_its_tokenizer():
    replaced = attach(model("llama"), transcoders("llama"))
    assert type(replaced) is type(model("llama"))
    assert replaced.tokenizer is model("llama").tokenizer
    assert replaced._module is model("llama")._module
    assert "transcoders" in repr(replaced)
    assert "transcoders" not in repr(model("llama"))


def test_detach_leaves_edits_that_came_before_and_after():
    with model("llama").edit() as (_, edited):
        edited.model.layers[0].mlp.output = torch.zeros_like(edited.model.layers[0].mlp.output)
    replaced = attach(edited, transcoders("llama"), [2])
    with replaced.edit(inplace=True):
        replaced.model.layers[1].mlp.output = torch.zeros_like(replaced.model.layers[1].mlp.output)
    detach(replaced)
    handles = [
        model("llama")
        ._module.model.layers[layer]
        .mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        for layer in (0, 1)
    ]
    expected = logits_of(model("llama"))
    for handle in handles:
        handle.remove()
    assert torch.equal(logits_of(replaced), expected)


def test_detaching_twice_or_from_the_original_is_an_error():
    replaced = attach(model("llama"), transcoders("llama"))
    detach(replaced)
    for envoy in (replaced, model("llama")):
        with pytest.raises(InputError, match="no transcoders attached"):
            detach(envoy)


def test_attaching_again_after_detaching():
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen)
    expected = logits_of(replaced)
    again = attach(detach(replaced), chosen)
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_attached_takes_off_what_it_put_on_also_after_an_exception(error):
    envoy, chosen = zoo.nnsight_model("gpt2"), transcoders("gpt2")
    logits, before, weights = logits_of(envoy), state(envoy), values(envoy)
    try:
        with attached(envoy, chosen) as replaced:
            assert distance(logits_of(replaced), logits) > 1e-3
            if error is not None:
                with replaced.trace(IDS[None]):
                    replaced.transcoders[1].features.output.save()
                    raise error("on purpose")
    except BaseException as caught:
        if error is None or not isinstance(caught, error):
            raise
    assert torch.equal(logits_of(replaced), logits)
    assert_unchanged(envoy, before, weights)


def test_the_transcoders_are_the_users_own_and_stay_as_they_are():
    chosen = random_transcoders(run_of("llama"), "per-layer", d_transcoder=WIDTH)
    mine = chosen[1]
    weights = {name: weight.clone() for name, weight in mine.state_dict().items()}
    replaced = attach(model("llama"), chosen)
    use(replaced)
    assert replaced.transcoders[1]._module.transcoder is mine
    before = logits_of(replaced)
    for name, weight in mine.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert not any(weight.requires_grad for weight in mine.parameters())
    with torch.no_grad():
        mine.b_enc += 1  # what the user does to them later is seen
    assert distance(logits_of(replaced), before) > 1e-3


def test_transcoders_of_another_device_are_copied_and_not_moved():
    """The model's own weights are elsewhere: only the mounted copies go there."""
    envoy = zoo.nnsight_model("llama")
    chosen = random_transcoders(run_of("llama"), "cross-layer", d_transcoder=WIDTH)
    sites = resolve_sites(envoy)
    parts = [chosen[layer] for layer in chosen.layers]
    from nnsight_transcoders.attachment.edit import _replacements

    there = envoy._module.to("meta")
    found = _replacements(there, sites, chosen, "replace")
    assert {p.device.type for r in found.values() for p in r.parameters()} == {"meta"}
    assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}
    assert found[2].below[1] is found[1].transcoder


def test_nothing_is_kept_alive():
    envoy = zoo.nnsight_model("llama")
    chosen = random_transcoders(run_of("llama"), "per-layer", d_transcoder=WIDTH)
    replaced = attach(envoy, chosen)
    use(replaced)
    mounted = weakref.ref(replaced.transcoders._module)
    weights = weakref.ref(chosen[1])
    detach(replaced)
    del replaced, chosen
    gc.collect()
    assert mounted() is None
    assert weights() is None
    logits_of(envoy)
    inside = weakref.ref(envoy._module)
    del envoy
    gc.collect()
    assert inside() is None


# -- attribute -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["operator", "autograd"])
@pytest.mark.parametrize(("name", "attention"), FORMS)
def test_attribute_leaves_the_model_as_it_was(name, attention, method):
    envoy = zoo.nnsight_model(name, attention=attention)
    logits, before, weights = logits_of(envoy), state(envoy), values(envoy)
    assert set(before["attention"]) == {attention}
    attribute(envoy, transcoders(name), IDS, method=method, max_feature_nodes=20)
    assert_unchanged(envoy, before, weights)
    assert torch.equal(logits_of(envoy), logits)


def test_attribute_leaves_the_model_as_it_was_after_an_exception():
    envoy = zoo.nnsight_model("llama", attention="sdpa")
    logits, before, weights = logits_of(envoy), state(envoy), values(envoy)
    wrong = resolve_sites(envoy, mlp_norm="model.layers.{layer}.mlp.down_proj")
    with pytest.raises(SiteError, match=r"layers\.0\.mlp"):  # inside the trace
        attribute(envoy, transcoders("llama"), IDS, sites=wrong)
    with pytest.raises(InputError):  # before it
        attribute(envoy, transcoders("llama"), torch.tensor([], dtype=torch.long))
    with pytest.raises(InputError):  # after it
        attribute(envoy, transcoders("llama"), IDS, targets=["no such token at all"])
    assert_unchanged(envoy, before, weights)
    assert torch.equal(logits_of(envoy), logits)


def test_collect_reads_the_same_values_from_a_model_that_runs_sdpa():
    envoy = zoo.nnsight_model("llama", attention="sdpa")
    run = collect(envoy, resolve_sites(envoy), IDS)
    assert distance(run.final, run_of("llama").final) <= 1e-5
    assert run.pattern[0].shape == (zoo.N_HEADS, len(IDS), len(IDS))


# -- what is refused -----------------------------------------------------------------------------


def test_an_unknown_mode():
    with pytest.raises(InputError, match=r"'subtract'.*replace, replace\+error, observe"):
        attach(model("llama"), transcoders("llama"), mode="subtract")


def test_an_unknown_layer():
    with pytest.raises(InputError, match=r"\[0, 1, 2\], not 7"):
        attach(model("llama"), transcoders("llama"), [1, 7])


def test_some_layers_of_a_cross_layer_set():
    with pytest.raises(InputError, match="cannot be cut"):
        attach(model("llama"), transcoders("llama", "cross-layer"), [1])


def test_a_set_for_another_width():
    one = transcoders("llama").config(1).replace(d_in=99, base_model="someone/else")
    chosen = TranscoderSet.from_transcoders({1: type(transcoders("llama")[1])(one)})
    with pytest.raises(MismatchError, match=r"d_in=99.*LlamaForCausalLM.*d_model=32.*someone/else"):
        attach(model("llama"), chosen)


def test_a_set_with_too_many_layers():
    one = transcoders("llama").config(1).replace(layer=5)
    chosen = TranscoderSet.from_transcoders({5: type(transcoders("llama")[1])(one)})
    with pytest.raises(MismatchError, match="up to 5.*3 layers"):
        attach(model("llama"), chosen)


def test_attaching_twice():
    replaced = attach(model("llama"), transcoders("llama"))
    with pytest.raises(InputError, match="already has transcoders attached"):
        attach(replaced, transcoders("llama"))
    assert logits_of(replaced).shape == (len(IDS), zoo.VOCAB)


def test_a_model_in_training_mode_or_none_at_all():
    envoy = zoo.nnsight_model("llama")
    envoy._module.train()
    with pytest.raises(InputError, match=r"\.eval\(\)"):
        attach(envoy, transcoders("llama"))
    with pytest.raises(InputError, match="nnsight model.*LlamaForCausalLM"):
        attach(envoy._module, transcoders("llama"))


def test_an_edit_that_uses_the_transcoders_says_so_once_they_are_gone():
    replaced = attach(model("llama"), transcoders("llama"))
    with replaced.edit(inplace=True):
        ablate(replaced, 1, 0)
    detach(replaced)
    with pytest.raises(InputError, match="no transcoders attached"):
        logits_of(replaced)

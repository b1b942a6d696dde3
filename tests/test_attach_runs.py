"""An attached model in batches, generation, sessions, further edits and backward passes."""

from __future__ import annotations

import warnings

import nnsight
import pytest
import torch
import zoo
from attach_support import (
    IDS,
    PROMPT,
    WIDTH,
    Reference,
    distance,
    hf_copy,
    logits_of,
    model,
    original_logits,
    transcoders,
)
from torch import Tensor

from nnsight_transcoders.attachment.edit import ablate, attach, set_features, steer

SHORT, MIDDLE = "w5 w9 w33", "w80 w7 w7 w21 w4"
NEW = 4
LENGTH = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def ids_of(prompt: str) -> Tensor:
    """A prompt's token ids."""
    return torch.tensor(zoo.tokenizer()(prompt)["input_ids"])


# -- several prompts -----------------------------------------------------------------------------

# Left padding moves absolute positions (GPT-2), so there unequal prompts differ by themselves.
RELATIVE = ["llama", "gemma2", "opt", "falcon", "falcon-alibi", "gpt-neox", "mixtral"]


@pytest.mark.parametrize("mode", ["replace", "replace+error"])
@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", RELATIVE)
def test_each_invoke_sees_its_own_rows_as_if_it_were_alone(name, kind, mode):
    replaced = attach(model(name), transcoders(name, kind), mode=mode)
    with torch.no_grad(), replaced.trace() as tracer:
        with tracer.invoke(SHORT):
            index = replaced.transcoders[1].token_index.output.save()
            short = replaced.transcoders[1].features.output.save()
            short_logits = replaced.output.logits.save()
        with tracer.invoke([MIDDLE, PROMPT]):
            index_two = replaced.transcoders[1].token_index.output.save()
            two = replaced.transcoders[1].features.output.save()
            two_logits = replaced.output.logits.save()
    assert index.tolist() == [[-1] * 4 + [0, 1, 2]]
    assert index_two.tolist() == [[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    for prompt, features, logits in (
        (SHORT, short[0], short_logits[0]),
        (MIDDLE, two[0], two_logits[0]),
        (PROMPT, two[1], two_logits[1]),
    ):
        ids = ids_of(prompt)
        with torch.no_grad(), replaced.trace(ids[None]):
            alone = replaced.transcoders[1].features.output[0].save()
            alone_logits = replaced.output.logits[0].save()
        assert distance(features[-len(ids) :], alone) <= 1e-4
        assert distance(logits[-len(ids) :], alone_logits) <= 1e-4


def test_prompts_of_equal_length_in_a_model_with_absolute_positions():
    replaced = attach(model("gpt2"), transcoders("gpt2"))
    other = "w6 w6 w8 w30 w2 w9 w11"
    with torch.no_grad(), replaced.trace() as tracer:
        with tracer.invoke(PROMPT):
            first = replaced.output.logits[0].save()
        with tracer.invoke(other):
            second = replaced.output.logits[0].save()
    assert distance(first, logits_of(replaced)) <= 1e-4
    assert distance(second, logits_of(replaced, ids_of(other))) <= 1e-4


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_edit_in_one_invoke_stays_in_it(by_hand):
    replaced = attach(model("llama"), transcoders("llama"))
    with torch.no_grad(), replaced.trace() as tracer:
        with tracer.invoke(SHORT):
            untouched = replaced.output.logits[0].save()
        with tracer.invoke(PROMPT):
            if by_hand:
                replaced.transcoders[1].features.output[:, -1, 3] = 5.0
            else:
                set_features(replaced, 1, 3, 5.0, positions=-1)
            edited = replaced.output.logits[0].save()
        with tracer.invoke(MIDDLE):
            if by_hand:
                replaced.transcoders[1].features.output[:, 2, 3] = 5.0  # two pads before it
            else:
                set_features(replaced, 1, 3, 5.0, positions=0)
            middle = replaced.output.logits[0].save()
    assert distance(untouched[-3:], logits_of(replaced, ids_of(SHORT))) <= 1e-4
    for prompt, position, found in ((PROMPT, -1, edited), (MIDDLE, 0, middle)):

        def change(acts: Tensor, position: int = position) -> Tensor:
            acts = acts.clone()
            acts[position, 3] = 5.0
            return acts

        reference = Reference("llama", transcoders("llama"), {1: change})
        ids = ids_of(prompt)
        assert distance(found[-len(ids) :], reference.output(ids)[0]) <= 1e-4


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "falcon", "bloom", "mistral"])
def test_greedy_generation_with_the_error_is_the_originals(name):
    replaced = attach(model(name), transcoders(name, "cross-layer"), mode="replace+error")
    found = replaced.generate(PROMPT, **LENGTH)
    mask = torch.ones_like(IDS)[None]
    expected = hf_copy(name).generate(IDS[None], attention_mask=mask, **LENGTH)
    assert found.shape == (1, len(IDS) + NEW)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_features_of_every_step_are_those_of_a_forward_pass_over_the_result(name, kind):
    replaced = attach(model(name), transcoders(name, kind))
    with replaced.generate(PROMPT, **LENGTH) as tracer:
        features = nnsight.save([])
        index = nnsight.save([])
        for _ in tracer.iter[:NEW]:
            index.append(replaced.transcoders[1].token_index.output)
            features.append(replaced.transcoders[1].features.output)
        result = tracer.result.save()
    assert [f.shape[1] for f in features] == [len(IDS), 1, 1, 1]
    assert torch.cat(index, 1).tolist() == [list(range(len(IDS) + NEW - 1))]
    with torch.no_grad(), replaced.trace(result[:, :-1]):
        whole = replaced.transcoders[1].features.output[0].save()
    assert distance(torch.cat(features, 1)[0], whole) <= 1e-4


def test_an_open_loop_over_all_steps():
    replaced = attach(model("llama"), transcoders("llama"))
    with pytest.warns(UserWarning, match="loop asked for a step the run did not make"):
        with replaced.generate(PROMPT, **LENGTH) as tracer:
            widths = nnsight.save([])
            for _ in tracer.iter[:]:
                widths.append(replaced.transcoders[1].features.output.shape[1])
    assert widths == [len(IDS), 1, 1, 1]


def greedy(reference: Reference) -> list[int]:
    """Greedy continuation by full forward passes of the reference."""
    ids = IDS
    for _ in range(NEW):
        ids = torch.cat([ids, reference.output(ids)[0, -1].argmax()[None]])
    return ids.tolist()


def test_generation_without_the_mlps_is_that_of_hooks_on_a_copy():
    replaced = attach(model("gpt2"), transcoders("gpt2", "skip"))
    found = replaced.generate(PROMPT, **LENGTH)
    assert found[0].tolist() == greedy(Reference("gpt2", transcoders("gpt2", "skip")))


@pytest.mark.parametrize("stored", [True, False])
def test_steering_at_every_step(stored):
    """Once as an edit of its own, once from the loop of a generation."""
    chosen = transcoders("gpt2")
    replaced = attach(model("gpt2"), chosen)
    pushed = {1: lambda acts: acts + 90 * (torch.arange(WIDTH) == 3)}
    expected = greedy(Reference("gpt2", chosen, pushed))
    if stored:
        with replaced.edit() as (tracer, steered):
            for _ in tracer.iter[:]:
                steer(steered, 1, 3, 90.0)
        with pytest.warns(UserWarning, match="loop asked for a step"):
            found = steered.generate(PROMPT, **LENGTH)
    else:
        with replaced.generate(PROMPT, **LENGTH) as tracer:
            for _ in tracer.iter[:NEW]:
                steer(replaced, 1, 3, 90.0)
            found = tracer.result.save()
    assert found[0].tolist() == expected
    assert expected != greedy(Reference("gpt2", chosen))


def test_positions_in_generation_count_the_whole_sequence_so_far():
    replaced = attach(model("llama"), transcoders("llama"))
    with replaced.generate([SHORT, PROMPT], **LENGTH) as tracer:
        changed = nnsight.save([])
        index = nnsight.save([])
        for step in tracer.iter[:NEW]:
            index.append(replaced.transcoders[1].token_index.output[:, -1].tolist())
            before = replaced.transcoders[1].features.output.clone()
            set_features(replaced, 1, 3, 9.0, positions=[4, 7])
            after = replaced.transcoders[1].features.output
            changed += [(step, row) for row, _, _ in (before != after).nonzero().tolist()]
    assert index == [[2, 6], [3, 7], [4, 8], [5, 9]]
    # Token 4 of the long prompt is in the first pass, of the short one in the third.
    assert changed == [(0, 1), (1, 1), (2, 0)]


# -- sessions, further edits, stopping -----------------------------------------------------------


def test_a_session_carries_features_from_one_trace_to_another():
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen)
    with torch.no_grad(), replaced.session():
        with replaced.trace(IDS.flip(0)[None]):
            features = replaced.transcoders[1].features.output
        with replaced.trace(IDS[None]):
            replaced.transcoders[1].features.output = features
            logits = replaced.output.logits[0].save()
    other = Reference("llama", chosen)
    other.output(IDS.flip(0))
    expected = Reference("llama", chosen, {1: lambda _: other.features[1]}).output()[0]
    assert distance(logits, expected) <= 1e-4


def test_a_further_edit_is_stored_on_a_copy_of_the_attached_model():
    chosen = transcoders("gemma2")
    replaced = attach(model("gemma2"), chosen)
    with replaced.edit() as (_, edited):
        ablate(edited, 1, range(WIDTH))
    reference = Reference("gemma2", chosen, {1: torch.zeros_like})
    for _ in range(2):
        assert distance(logits_of(edited), reference.output()[0]) <= 1e-4
        assert distance(logits_of(replaced), Reference("gemma2", chosen).output()[0]) <= 1e-4
    assert torch.equal(logits_of(model("gemma2")), original_logits("gemma2"))


def test_an_edit_made_before_attaching_stays():
    with model("llama").edit() as (_, edited):
        edited.model.layers[1].mlp.output = torch.zeros_like(edited.model.layers[1].mlp.output)
    chosen = transcoders("llama")
    logits = logits_of(attach(edited, chosen, [0, 2]))
    expected = Reference("llama", chosen, outputs={1: lambda y, _: torch.zeros_like(y)}).output()[0]
    assert distance(logits, expected) <= 1e-4


@pytest.mark.parametrize("mode", ["replace", "replace+error"])
def test_a_trace_may_stop_before_all_layers_have_run(mode):
    replaced = attach(model("llama"), transcoders("llama"), mode=mode)
    ran = []
    handle = model("llama")._module.lm_head.register_forward_hook(lambda *_: ran.append(1))
    try:
        for path in ("model.layers.0", "model.layers.1.self_attn", "transcoders.1.features"):
            with torch.no_grad(), replaced.trace(IDS[None]) as tracer:
                value = replaced.get(path).output
                kept = (value[0] if isinstance(value, tuple) else value).save()
                tracer.stop()
            assert kept.shape[:2] == (1, len(IDS))
        assert not ran
        assert logits_of(replaced).shape == (len(IDS), zoo.VOCAB)
        assert ran
    finally:
        handle.remove()


def test_a_location_that_is_never_reached_is_an_error_and_leaves_the_model_usable():
    replaced = attach(model("llama"), transcoders("llama"))
    before = logits_of(replaced)
    with pytest.raises(Exception, match=r"layers\.0\.mlp\.up_proj"):
        with replaced.trace(IDS[None]):
            replaced.model.layers[0].mlp.up_proj.output.save()
    with pytest.raises(ZeroDivisionError):
        with replaced.trace(IDS[None]):
            replaced.transcoders[1].features.output[:] = 1 / 0
    assert torch.equal(logits_of(replaced), before)


# -- inputs of other kinds -----------------------------------------------------------------------


def test_embeddings_keywords_and_a_plain_wrapper():
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen)
    expected = logits_of(replaced)
    embeddings = hf_copy("llama").get_input_embeddings()(IDS[None]).detach()
    plain = attach(nnsight.NNsight(zoo.hf_model("llama")), chosen)
    mask = torch.ones_like(IDS)[None]
    for envoy, kwargs in (
        (replaced, {"inputs_embeds": embeddings}),
        (plain, {"inputs_embeds": embeddings}),
        (plain, {"input_ids": IDS[None]}),
        (plain, {"input_ids": IDS[None], "attention_mask": mask}),
    ):
        with torch.no_grad(), envoy.trace(**kwargs):
            logits = envoy.output.logits[0].save()
        assert distance(logits, expected) <= 1e-5
    assert distance(replaced.trace(IDS[None], trace=False).logits[0].detach(), expected) <= 1e-5


def test_a_cache_records_the_mounted_modules():
    replaced = attach(model("llama"), transcoders("llama"))
    with torch.no_grad(), replaced.trace(IDS[None]) as tracer:
        kept = tracer.cache()
        features = replaced.transcoders[1].features.output.save()
    assert torch.equal(kept["model.transcoders.1.features"].output, features)


# -- leading positions ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_leading_positions_keep_the_mlps_output_and_have_no_features(name, kind):
    chosen = transcoders(name, kind, leading_positions=2)
    replaced = attach(model(name), chosen)

    def keep(acts: Tensor) -> Tensor:
        return acts * (torch.arange(len(acts)) >= 2)[:, None]

    def write(y: Tensor, out: Tensor) -> Tensor:
        return torch.where((torch.arange(len(y)) >= 2)[:, None], out, y)

    reference = Reference(
        name, chosen, dict.fromkeys(range(3), keep), dict.fromkeys(range(3), write)
    )
    expected = reference.output()[0]
    with torch.no_grad(), replaced.trace() as tracer:
        with tracer.invoke(PROMPT):
            features = replaced.transcoders[1].features.output[0].save()
            logits = replaced.output.logits[0].save()
        with tracer.invoke(SHORT):
            short = replaced.transcoders[1].features.output[0].save()
            short_logits = replaced.output.logits[0].save()
    assert distance(logits, expected) <= 1e-4
    assert not features[:2].any()
    assert features[2:].any(-1).all()
    assert distance(short_logits[-3:], reference.output(ids_of(SHORT))[0]) <= 1e-4
    assert not short[:-1].any()
    assert short[-1].any()


def test_leading_positions_in_generation_are_those_of_the_prompt():
    chosen = transcoders("llama", leading_positions=2)
    replaced = attach(model("llama"), chosen)
    with replaced.generate(PROMPT, max_new_tokens=2, min_new_tokens=2, do_sample=False) as tracer:
        active = nnsight.save([])
        for _ in tracer.iter[:2]:
            active.append(replaced.transcoders[1].features.output[0].any(-1).tolist())
    assert active == [[False, False, True, True, True, True, True], [True]]


@pytest.mark.parametrize("mode", ["replace+error", "observe"])
def test_leading_positions_leave_the_logits_in_the_other_modes(mode):
    chosen = transcoders("llama", "cross-layer", leading_positions=2)
    replaced = attach(model("llama"), chosen, mode=mode)
    assert distance(logits_of(replaced), original_logits("llama")) <= 1e-4


# -- warnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_no_warning_in_a_plain_trace_or_generation(name, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced = attach(model(name), transcoders(name, "cross-layer"), mode=mode)
        with torch.no_grad(), replaced.trace(PROMPT):
            replaced.transcoders[1].features.output[:, -1, 3] = 0
            replaced.output.logits.save()
        with replaced.generate(
            PROMPT, max_new_tokens=2, min_new_tokens=2, do_sample=False
        ) as tracer:
            for _ in tracer.iter[:2]:
                replaced.transcoders[1].features.output.save()
            tracer.result.save()
        replaced.generate(PROMPT, max_new_tokens=2, min_new_tokens=2, do_sample=False)

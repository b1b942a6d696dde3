"""Reading and writing features in a trace: what is seen, and what it does downstream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attach_support import (
    IDS,
    PROMPT,
    WIDTH,
    Reference,
    distance,
    logits_of,
    model,
    original_logits,
    transcoders,
)
from torch import Tensor

from nnsight_transcoders.attachment.edit import ablate, attach, scale, set_features, steer
from nnsight_transcoders.errors import InputError

NAMES = ["llama", "gpt2", "gemma2", "opt", "falcon"]
KINDS = ["per-layer", "skip", "cross-layer"]
SHORT = "w5 w9 w33"
N = len(IDS)


def edit(*columns: int, rows: Any = slice(None), value: float = 2.0) -> Any:
    """A function of features ``(rows, features)`` that sets some of them."""

    def change(features: Tensor) -> Tensor:
        features = features.clone()
        for column in columns:
            features[rows, column] = value
        return features

    return change


def active(name: str, layer: int, chosen: Any = None) -> list[int]:
    """Features of a layer that are active at the last position, the strongest first."""
    reference = Reference.observing(name, chosen or transcoders(name))
    last = reference.encoded(layer)[-1]
    return last.argsort(descending=True)[: int((last > 0).sum())].tolist()


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_value_can_be_read(name, kind):
    chosen = transcoders(name, kind)
    reference = Reference(name, chosen)
    reference.output()
    replaced = attach(model(name), chosen)
    with torch.no_grad(), replaced.trace(IDS[None]):
        node = replaced.transcoders[2]
        index = node.token_index.output.save()
        pre = node.pre_activations.output.save()
        features = node.features.output.save()
        reconstruction = node.reconstruction.output.save()
    expected = reference.x[2] @ chosen[2].W_enc.T + chosen[2].b_enc
    assert index.tolist() == [list(range(N))]
    assert features.shape == (1, N, WIDTH)
    assert (features == 0).any()
    assert distance(pre[0], expected) <= 1e-4
    assert distance(features[0], expected.clamp_min(0)) <= 1e-4
    assert distance(reconstruction[0], reference.reconstruction(2)) <= 1e-4


def test_there_is_no_error_in_replace_mode():
    replaced = attach(model("llama"), transcoders("llama"))
    with pytest.raises(Exception, match=r"transcoders\.1\.error\.output"):
        with replaced.trace(IDS[None]):
            replaced.transcoders[1].error.output.save()


def test_values_are_not_changed_by_a_model_that_adds_in_place():
    """Falcon adds attention's output into the MLP's."""
    chosen = transcoders("falcon")
    replaced = attach(model("falcon"), chosen)
    reference = Reference("falcon", chosen)
    reference.output()
    with torch.no_grad(), replaced.trace(IDS[None]):
        reconstructions = [t.reconstruction.output for t in replaced.transcoders]
        kept = torch.cat(reconstructions).save()
    for layer in chosen.layers:
        assert distance(kept[layer], reference.reconstruction(layer)) <= 1e-4


# -- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_features_written_in_place(name, kind):
    chosen = transcoders(name, kind)
    replaced = attach(model(name), chosen)
    with torch.no_grad(), replaced.trace(IDS[None]):
        replaced.transcoders[1].features.output[:, -2:, 3] = 2.0
        after = replaced.transcoders[2].features.output.save()
        logits = replaced.output.logits[0].save()
    reference = Reference(name, chosen, {1: edit(3, rows=slice(-2, None))})
    assert distance(logits, reference.output()[0]) <= 1e-4
    assert distance(after[0], reference.encoded(2)) <= 1e-4
    assert distance(logits, logits_of(replaced)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_features_assigned(name):
    chosen = transcoders(name)
    replaced = attach(model(name), chosen)
    new = torch.rand(1, N, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), replaced.trace(IDS[None]):
        replaced.transcoders[1].features.output = new
        logits = replaced.output.logits[0].save()
    reference = Reference(name, chosen, {1: lambda _: new[0]})
    assert distance(logits, reference.output()[0]) <= 1e-4


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_pre_activations_go_through_the_activation(name, in_place):
    chosen = transcoders(name)
    replaced = attach(model(name), chosen)
    with torch.no_grad(), replaced.trace(IDS[None]):
        node = replaced.transcoders[1]
        if in_place:
            node.pre_activations.output[..., 3] = 2.0
            node.pre_activations.output[..., 4] = -2.0
        else:
            pre = node.pre_activations.output.clone()
            pre[..., 3], pre[..., 4] = 2.0, -2.0
            node.pre_activations.output = pre
        features = node.features.output[0].save()
        logits = replaced.output.logits[0].save()
    both = {1: lambda acts: edit(4, value=0.0)(edit(3)(acts))}
    assert distance(logits, Reference(name, chosen, both).output()[0]) <= 1e-4
    assert set(features[:, 3].tolist()) == {2.0}
    assert set(features[:, 4].tolist()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_reconstruction_takes_the_mlps_place(name):
    chosen = transcoders(name)
    replaced = attach(model(name), chosen)
    with torch.no_grad(), replaced.trace(IDS[None]):
        replaced.transcoders[1].reconstruction.output *= 3
        logits = replaced.output.logits[0].save()
    reference = Reference(name, chosen, outputs={1: lambda _, out: 3 * out})
    assert distance(logits, reference.output()[0]) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_error_can_be_taken_away(name):
    chosen = transcoders(name)
    replaced = attach(model(name), chosen, mode="replace+error")
    with torch.no_grad(), replaced.trace(IDS[None]):
        error = replaced.transcoders[1].error.output.clone().save()
        replaced.transcoders[1].error.output = torch.zeros_like(error)
        logits = replaced.output.logits[0].save()
    outputs = {0: lambda y, _: y, 1: lambda _, out: out, 2: lambda y, _: y}
    reference = Reference(name, chosen, outputs=outputs)
    assert distance(logits, reference.output()[0]) <= 1e-4
    assert distance(error[0], reference.y[1] - reference.reconstruction(1)) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_beside_the_error_adds_decoder_rows_to_the_mlps_output(name, kind):
    """With the error kept, editing a feature moves the output by what its decoder row says; a
    cross-layer feature's also at the later layers."""
    chosen = transcoders(name, kind)
    replaced = attach(model(name), chosen, mode="replace+error")
    with torch.no_grad(), replaced.trace(IDS[None]):
        old = replaced.transcoders[1].features.output[0, :, 3].clone().save()
        replaced.transcoders[1].features.output[..., 3] = 2.0
        logits = replaced.output.logits[0].save()
    outputs = {0: lambda y, _: y, 2: lambda y, _: y}
    change = (2.0 - old)[:, None]
    for column, target in enumerate(chosen.targets(1)):
        rows = chosen[1].W_dec[3] if kind != "cross-layer" else chosen[1].W_dec[3, column]
        outputs[target] = lambda y, _, rows=rows: y + change * rows
    reference = Reference(name, chosen, outputs=outputs)
    assert distance(logits, reference.output()[0]) <= 1e-4
    assert distance(logits, original_logits(name)) > 1e-3


def test_edits_have_no_effect_when_observing():
    replaced = attach(model("llama"), transcoders("llama"), mode="observe")
    with torch.no_grad(), replaced.trace(IDS[None]):
        replaced.transcoders[1].features.output[:] = 5.0
        replaced.transcoders[1].error.output[:] = 5.0
        logits = replaced.output.logits[0].save()
    assert torch.equal(logits, original_logits("llama"))


# -- the helpers ---------------------------------------------------------------------------------


def run_helper(replaced: Any, helper: Any, *args: Any, prompts: Any = PROMPT) -> Any:
    """Features of layer 1 before and after a helper, and the logits."""
    with torch.no_grad(), replaced.trace(prompts):
        before = replaced.transcoders[1].features.output.clone().save()
        helper(replaced, 1, *args)
        after = replaced.transcoders[1].features.output.clone().save()
        logits = replaced.output.logits.save()
    return before, after, logits


HELPERS = [
    (set_features, (4.0,), lambda old: torch.full_like(old, 4.0)),
    (ablate, (), torch.zeros_like),
    (scale, (-3.0,), lambda old: -3 * old),
    (steer, (0.5,), lambda old: old + 0.5),
]
POSITIONS = [
    (None, [0, 1, 2, 3, 4, 5, 6]),
    (2, [2]),
    (-1, [6]),
    ([0, -2, 3], [0, 3, 5]),
    ([-7, 6], [0, 6]),
    ([9, -8], []),
    ([], []),
]


@pytest.mark.parametrize(("positions", "expected"), POSITIONS)
@pytest.mark.parametrize(("helper", "args", "rule"), HELPERS)
def test_a_helper_changes_the_features_at_the_positions_asked_for(
    helper, args, rule, positions, expected
):
    replaced = attach(model("llama"), transcoders("llama"))
    columns = active("llama", 1)[:2]
    before, after, logits = run_helper(replaced, helper, columns, *args, positions)
    wanted = before.clone()
    for position in expected:
        wanted[0, position, columns] = rule(before[0, position, columns])
    assert torch.equal(after, wanted)
    assert not expected or not torch.equal(before, after)
    reference = Reference("llama", transcoders("llama"), {1: lambda _: wanted[0]})
    assert distance(logits[0], reference.output()[0]) <= 1e-4


@pytest.mark.parametrize(("positions", "expected"), POSITIONS)
def test_positions_count_each_prompts_own_tokens_and_leave_padding_alone(positions, expected):
    replaced = attach(model("llama"), transcoders("llama"))
    before, after, _ = run_helper(
        replaced, set_features, 3, 9.0, positions, prompts=[SHORT, PROMPT]
    )
    changed = [(row, pos) for row, pos, _ in (before != after).nonzero().tolist()]
    wanted = [] if positions is None else [positions] if isinstance(positions, int) else positions
    own = sorted({p if p >= 0 else 3 + p for p in wanted} & {0, 1, 2})
    own = [0, 1, 2] if positions is None else own
    assert changed == [(0, 4 + p) for p in own] + [(1, p) for p in expected]


def test_helpers_add_up_and_come_in_any_order_with_reads():
    replaced = attach(model("llama"), transcoders("llama"))
    one, two = active("llama", 1)[:2]
    with torch.no_grad(), replaced.trace(PROMPT):
        replaced.transcoders[1].token_index.output.save()
        set_features(replaced, 1, one, 3.0)
        scale(replaced, 1, one, 2.0, positions=-1)
        first = replaced.transcoders[1].features.output.clone().save()
        ablate(replaced, 1, [two])
        steer(replaced, 1, [one, two], 1.0, positions=0)
        features = replaced.transcoders[1].features.output.clone().save()
        ablate(replaced, 2, 0)
        later = replaced.transcoders[2].features.output.clone().save()
    assert first[0, :, one].tolist() == [3.0] * 6 + [6.0]
    assert features[0, :, one].tolist() == [4.0] + [3.0] * 5 + [6.0]
    assert features[0, :, two].tolist() == [1.0] + [0.0] * 6
    assert not later[..., 0].any()


def test_a_value_may_be_a_tensor_per_position_and_feature():
    replaced = attach(model("llama"), transcoders("llama"))
    value = torch.arange(2.0 * N).reshape(1, N, 2)
    _, after, _ = run_helper(replaced, set_features, [5, 3], value)
    assert torch.equal(after[..., [5, 3]], value)
    _, after, _ = run_helper(replaced, set_features, [5, 3], torch.tensor([1.0, 2.0]), -1)
    assert after[0, -1, [5, 3]].tolist() == [1.0, 2.0]


def test_feature_indices_may_be_a_tensor():
    replaced = attach(model("llama"), transcoders("llama"))
    _, after, _ = run_helper(replaced, ablate, torch.tensor([5, 3]), torch.tensor([-1]))
    assert not after[0, -1, [5, 3]].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.transcoders[1].features.output[..., 3].fill_(2.0),
        lambda r: set_features(r, 1, 3, 2.0),
    ],
    ids=["in-place", "helper"],
)
def test_a_helper_and_an_edit_by_hand_do_the_same_in_a_model_with_sandwich_norms(change):
    chosen = transcoders("gemma2", "cross-layer", "R", "O'")
    replaced = attach(model("gemma2"), chosen)
    with torch.no_grad(), replaced.trace(IDS[None]):
        change(replaced)
        logits = replaced.output.logits[0].save()
    assert distance(logits, Reference("gemma2", chosen, {1: edit(3)}).output()[0]) <= 1e-4


# -- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize("features", [-1, WIDTH, [0, WIDTH], []])
def test_a_feature_that_is_not_there(features):
    replaced = attach(model("llama"), transcoders("llama"))
    with pytest.raises(InputError, match=f"layer 1 has features 0 to {WIDTH - 1}"):
        with replaced.trace(IDS[None]):
            ablate(replaced, 1, features)
    assert distance(logits_of(replaced), logits_of(replaced)) == 0


def test_a_layer_without_transcoder_is_named():
    replaced = attach(model("llama"), transcoders("llama"), [0, 2])
    with pytest.raises(InputError, match="layers 0, 2 have transcoders, not 1"):
        with replaced.trace(IDS[None]):
            ablate(replaced, 1, 0)


def test_a_helper_outside_a_trace():
    replaced = attach(model("llama"), transcoders("llama"))
    for helper in (ablate, lambda *a: set_features(*a, 1.0), lambda *a: scale(*a, 1.0)):
        with pytest.raises(InputError, match="inside a trace"):
            helper(replaced, 1, 0)


def test_a_helper_on_a_model_without_transcoders():
    with pytest.raises(InputError, match="no transcoders attached"):
        with model("llama").trace(IDS[None]):
            steer(model("llama"), 1, 0, 1.0)

"""``verify`` of sets whose features are chosen over all layers together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import verify_support as vs
from torch import Tensor

from nnsight_transcoders import TranscoderSet, verify
from nnsight_transcoders.activations import keep_joint


@pytest.fixture(scope="module")
def model() -> Any:
    return vs.relu_model()


def joint(model: Any, k: int, **changes: Any) -> TranscoderSet:
    return vs.exact(model, activation="jointtopk", k=k, **changes)


@torch.no_grad()
def brute_force(model: Any, chosen: TranscoderSet, ids: list[int], k: int) -> tuple[Any, ...]:
    """Outputs, errors and active features by layer, and the loss with reconstructions in place."""
    blocks, tokens = model._module.transformer.h, torch.tensor([ids])
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> Any:
        return lambda _, inputs, output: seen.__setitem__(layer, (inputs[0][0], output[0]))

    def put(made: Tensor) -> Any:
        return lambda *_: made[None]

    hooks = [block.mlp.register_forward_hook(keep(n)) for n, block in enumerate(blocks)]
    model._module(tokens)
    [hook.remove() for hook in hooks]
    acts = {n: chosen[n].encode(x) for n, (x, _) in seen.items()}
    start = chosen.config(0).leading_positions
    for value in acts.values():
        value[:start] = 0
    kept = keep_joint(acts, {n: chosen[n].W_dec.norm(dim=1) for n in acts}, k)
    made = {n: chosen[n].decode(kept[n], x) for n, (x, _) in seen.items()}
    for n, (_, y) in seen.items():
        made[n][:start] = y[:start]
    hooks = [block.mlp.register_forward_hook(put(made[n])) for n, block in enumerate(blocks)]
    logits = model._module(tokens).logits[0]
    [hook.remove() for hook in hooks]
    ce = float(F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum"))
    outputs = {n: y[start:] for n, (_, y) in seen.items()}
    errors = {n: (y - made[n])[start:] for n, (_, y) in seen.items()}
    return outputs, errors, {n: int(a.count_nonzero()) for n, a in kept.items()}, ce


@pytest.mark.parametrize(("k", "leading"), [(5, 0), (9, 2)])
def test_every_number_by_brute_force(model: Any, k: int, leading: int) -> None:
    chosen = joint(model, k, leading_positions=leading)
    report = verify(model, chosen, vs.TEXT)
    runs = [brute_force(model, chosen, ids, k) for ids in vs.TEXT]
    n = sum(len(ids) - leading for ids in vs.TEXT)
    for fit in report.layers:
        y = torch.cat([run[0][fit.layer] for run in runs]).double()
        error = torch.cat([run[1][fit.layer] for run in runs]).double()
        assert fit.fvu == pytest.approx(
            float(error.square().sum() / (y - y.mean(0)).square().sum())
        )
        assert fit.l0 == pytest.approx(sum(run[2][fit.layer] for run in runs) / n)
        assert fit.ce_change is None
    assert report.n_tokens == n
    assert sum(fit.l0 for fit in report.layers) == pytest.approx(k)
    predicted = sum(len(ids) - 1 for ids in vs.TEXT)
    assert report.ce_replaced == pytest.approx(sum(run[3] for run in runs) / predicted, rel=1e-5)


def test_all_features_are_an_exact_set(model: Any) -> None:
    report = verify(model, joint(model, vs.LAYERS * vs.D), vs.TEXT)
    assert report.ok
    assert max(fit.fvu for fit in report.layers) < 1e-9
    assert report.ce_replaced == pytest.approx(report.ce, abs=1e-5)


def test_what_is_wrong_with_it_is_named(model: Any) -> None:
    chosen = joint(model, vs.LAYERS * vs.D)
    spoilt = {}
    for layer in chosen.layers:
        spoilt[layer] = copy.deepcopy(chosen[layer])
        spoilt[layer].W_dec.data = spoilt[layer].W_dec.data.T.contiguous()
    report = verify(model, TranscoderSet.from_transcoders(spoilt), vs.TEXT)
    assert not report.ok
    assert {fit.hypothesis.split(" (")[0] for fit in report.layers if fit.hypothesis} == {
        "W_dec transposed"
    }

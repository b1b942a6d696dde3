"""Gradients: those of the loss, where it is smooth, and the stated formulas where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.training import objectives
from nnsight_transcoders.training.config import TrainConfig
from nnsight_transcoders.training.group import Group
from nnsight_transcoders.training.init import Units, make_part, transcoder_config
from nnsight_transcoders.training.sparse import (
    _largest,
    choose_batch_topk,
    choose_topk,
    sparse_encode,
    sparse_sum,
)

B, D, F = 7, 5, 12
LAYERS = (0, 1)


def group_of(**settings: Any) -> Group:
    """A group in float64 with random weights, scales other than one, and some dead features."""
    config = TrainConfig(
        **{"d_transcoder": F, "batch_size": B, "n_tokens": B, "buffer_size": B, "k": 3, **settings}
    )
    layers = LAYERS if config.cross_layer else LAYERS[:1]
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for layer in layers:
        part = make_part(transcoder_config(config, layer, D, None), layers, 0.1).double()
        for name, weight in part.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data.copy_(noise.abs() * 0.2 if "threshold" in name else noise)
        parts[layer] = part
    group = Group(parts, config, Units({0: 1.3, 1: 0.7}, {0: 0.9, 1: 1.1}))
    for layer in layers:
        group.idle(layer)[:4] = config.dead_after
    return group


def batch(layers: tuple[int, ...]) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(4)]
    return {layer: (draw[2 * layer], draw[2 * layer + 1]) for layer in layers}


def differences(group: Group, weight: Tensor, values: Any, eps: float = 1e-6) -> Tensor:
    """Central differences of the loss by a weight's entries."""
    found = torch.zeros_like(weight)
    with torch.no_grad():
        for i in range(weight.numel()):
            entry, old = weight.view(-1), weight.view(-1)[i].item()
            entry[i] = old + eps
            above = group(values, 0.3)[0]
            entry[i] = old - eps
            below = group(values, 0.3)[0]
            entry[i] = old
            found.view(-1)[i] = (above - below) / (2 * eps)
    return found


CASES = [
    {"activation": "relu", "sparsity": "l1"},
    {"activation": "relu", "sparsity": "l1", "decoder_norm": "unit"},
    {"activation": "relu", "sparsity": "tanh", "objective": "mse"},
    {"activation": "relu", "sparsity": None, "skip": True},
    {"activation": "topk", "skip": True},
    {"activation": "topk", "objective": "mse", "sparsity": "l1"},
    {"activation": "batchtopk"},
    {"activation": "batchtopk", "sparsity": "tanh"},
    {"activation": "grouptopk", "n_groups": 3, "k": 2},
    {"activation": "topk", "cross_layer": True, "skip": True},
    {"activation": "relu", "cross_layer": True, "sparsity": "tanh"},
    {"activation": "topk", "input_site": "O", "output_site": "O"},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_loss_has_the_gradient_of_finite_differences(settings: dict[str, Any]) -> None:
    # The auxiliary loss' residual is a constant on purpose, so it has a test of its own.
    group = group_of(aux_weight=0.0, **settings)
    values = batch(group.layers)
    loss, _ = group(values, 0.3)
    loss.backward()
    for name, weight in group.named_parameters():
        if weight.requires_grad:
            expected = differences(group, weight.data, values)
            got = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("sparsity", ["l0", "tanh", "l1"])
def test_jumprelus_weights_have_the_gradient_of_finite_differences(sparsity: str) -> None:
    """The step in the threshold is left out by keeping every value away from it."""
    group = group_of(activation="jumprelu", sparsity=sparsity, aux_weight=0.0, bandwidth=1e-9)
    values = batch(group.layers)
    group(values, 0.3)[0].backward()
    for name, weight in group.named_parameters():
        if "threshold" not in name:
            expected = differences(group, weight.data, values)
            torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_jumprelus_thresholds_have_the_stated_gradient() -> None:
    """Rajamanoharan et al. 2024, written out entry by entry."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, F, generator=generator, dtype=torch.float64)
    theta = torch.rand(F, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(50, F, generator=generator, dtype=torch.float64)
    eps, limits = 0.4, theta.tolist()
    (for_acts,) = torch.autograd.grad((objectives.jumprelu(z, theta, eps) * upstream).sum(), theta)
    (for_l0,) = torch.autograd.grad(objectives.l0_penalty(z, theta, eps), theta)
    for i in range(F):
        acts = l0 = 0.0
        for n in range(50):
            if abs((float(z[n, i]) - limits[i]) / eps) < 0.5:
                acts -= limits[i] / eps * float(upstream[n, i])
                l0 -= 1 / eps / 50
        assert float(for_acts[i]) == pytest.approx(acts)
        assert float(for_l0[i]) == pytest.approx(l0)
    assert int((for_l0 != 0).sum()) > 3


@pytest.mark.parametrize(
    "choose", [choose_topk(3), choose_topk(2, 3), choose_batch_topk(3)], ids=["k", "group", "batch"]
)
def test_the_sparse_products_are_the_dense_ones(choose: Any) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    x, weight, bias, table = draw(B, D), draw(F, D), draw(F), draw(F, 2 * D)
    upstream = torch.randn(B, 2 * D, generator=generator, dtype=torch.float64)
    active = sparse_encode(x, weight, bias, choose)
    sparse = sparse_sum(active, table)
    got = torch.autograd.grad(sparse, (x, weight, bias, table), upstream)
    pre = x @ weight.T + bias
    mask = (active.dense() > 0).detach()
    dense = torch.where(mask, pre, 0.0) @ table
    expected = torch.autograd.grad(dense, (x, weight, bias, table), upstream)
    torch.testing.assert_close(sparse, dense)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_who_is_active() -> None:
    generator = torch.Generator().manual_seed(3)
    pre = torch.randn(B, F, generator=generator)
    x, eye = pre, torch.eye(F)
    zero = torch.zeros(F)
    top = sparse_encode(x, eye, zero, choose_topk(3)).dense()
    assert bool(((top > 0).sum(1) <= 3).all())
    kept = pre.relu().topk(3, dim=1).values.min(1, keepdim=True).values
    torch.testing.assert_close(top, torch.where(pre.relu() >= kept, pre.relu(), 0.0))
    groups = sparse_encode(x, eye, zero, choose_topk(1, 3)).dense()
    for part, whole in zip(groups.chunk(3, 1), pre.relu().chunk(3, 1), strict=True):
        torch.testing.assert_close(part.max(1).values, whole.max(1).values)
        assert int((part > 0).sum(1).max()) <= 1
    batched = sparse_encode(x, eye, zero, choose_batch_topk(2)).dense()
    assert int((batched > 0).sum()) == 2 * B
    assert float(batched[batched > 0].min()) >= float(pre[batched == 0].max())


@pytest.mark.parametrize("kind", ["normal", "few features", "ties"])
def test_the_largest_of_a_batch_are_those_of_topk(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(64 * 340, generator=generator)
    if kind == "few features":  # all that is large lies in columns the sample does not have
        flat[::17] = -1.0
    if kind == "ties":
        flat = flat.round()
    for n in (1, 30, 500, 5000, 20_000):
        values, places = _largest(flat, n)
        assert torch.equal(values.sort().values, flat.topk(n).values.sort().values)
        assert torch.equal(flat[places], values)
        assert len(set(places.tolist())) == n


@pytest.mark.parametrize("cross_layer", [False, True])
def test_dead_features_explain_what_is_left_of_the_output(cross_layer: bool) -> None:
    """Not of the input, which the paper's code takes (error 7): written out by hand."""
    group = group_of(cross_layer=cross_layer, aux_weight=0.5, aux_k=2)
    plain = group_of(cross_layer=cross_layer, aux_weight=0.0)
    values = batch(group.layers)
    losses = [group(values, 0.0)[0], plain(values, 0.0)[0]]
    added = losses[0] - losses[1]
    expected = torch.zeros((), dtype=torch.float64)
    for target in group.layers:
        y = values[target][1] * group.units.outputs[target]
        made, dead_made = torch.zeros_like(y), torch.zeros_like(y)
        for source in group.layers:
            if source > target:
                continue
            part = group.part(source)
            x = values[source][0] * group.units.inputs[source]
            table = part.W_dec[:, target - source] if cross_layer else part.W_dec
            pre = x @ part.W_enc.T + part.b_enc
            made = made + part.activation(pre) @ table
            dead_made = dead_made + objectives.largest(pre[:, :4], 2) @ table[:4]
        residual = (y - made - group.part(target).b_dec).detach()
        spread = (residual - residual.mean(0)).square().sum()
        expected = expected + 0.5 * (residual - dead_made).square().sum() / spread
    torch.testing.assert_close(added, expected)
    for loss in losses:
        loss.backward()
    for layer in group.layers:
        by_dead = group.part(layer).W_dec.grad - plain.part(layer).W_dec.grad
        assert not by_dead[4:].any()  # it moves no live feature
        assert by_dead[:4].any()


def test_unit_rows_stay_and_their_gradient_has_no_part_along_them() -> None:
    group = group_of(decoder_norm="unit")
    group.constrain()
    table = group.part(0).W_dec
    torch.testing.assert_close(table.norm(dim=1), torch.ones(F, dtype=torch.float64))
    group(batch(group.layers), 0.0)[0].backward()
    group.project()
    torch.testing.assert_close(
        (table * table.grad).sum(1), torch.zeros(F, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_counters_and_thresholds_follow_the_steps() -> None:
    group = group_of(activation="batchtopk")
    fired = torch.zeros(F, dtype=torch.bool)
    fired[5] = True
    group.part(0).activation.threshold.data.zero_()
    group.observe(0, fired, torch.tensor(0.5), 100)
    assert group.idle(0)[5] == 0
    assert group.idle(0)[6] == 100
    assert float(group.threshold(0)) == pytest.approx(0.5)
    group.observe(0, fired, torch.tensor(1.5), 100)
    assert float(group.threshold(0)) == pytest.approx(0.51)
    assert group.idle(0)[6] == 200

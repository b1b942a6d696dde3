"""The frozen linear model: adjoints, replay, and what the paper's shortcut for norms gets wrong."""

from __future__ import annotations

import pytest
import torch
import zoo
from setups import engine, relative, run
from torch import Tensor

from nnsight_transcoders.circuits.linear import FrozenAttention, FrozenNorm, Targets

T, B, D = 5, 3, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(centred: bool) -> FrozenNorm:
    return FrozenNorm(randn(D, seed=1), randn(D, seed=2), randn(T, 1, 1, seed=3).abs(), centred)


def attention(n_heads: int, n_values: int, head_dim: int = 4) -> FrozenAttention:
    pattern = randn(n_heads, T, T, seed=4).softmax(-1).tril()
    return FrozenAttention(
        pattern,
        randn(n_values * head_dim, D, seed=5),
        randn(n_values * head_dim, seed=6),
        randn(D, n_heads * head_dim, seed=7),
        randn(D, seed=8),
    )


@pytest.mark.parametrize("centred", [True, False])
def test_norm_adjoint(centred: bool) -> None:
    part, x, g = norm(centred), randn(T, B, D), randn(T, B, D, seed=9)
    assert torch.allclose((g * part.linear(x)).sum(), (part.adjoint(g) * x).sum())


@pytest.mark.parametrize("centred", [True, False])
def test_norm_adjoint_at_one_position(centred: bool) -> None:
    part, g = norm(centred), randn(B, D)
    positions = torch.tensor([4, 0, 2])
    whole = torch.zeros(T, B, D, dtype=torch.float64)
    whole[positions, torch.arange(B)] = g
    expected = part.adjoint(whole)[positions, torch.arange(B)]
    assert torch.allclose(part.adjoint_at(g, positions), expected)


@pytest.mark.parametrize(("n_heads", "n_values"), [(4, 4), (4, 2), (4, 1)])
def test_attention_adjoint(n_heads: int, n_values: int) -> None:
    part, x, g = attention(n_heads, n_values), randn(T, B, D), randn(T, B, D, seed=9)
    assert torch.allclose((g * part.linear(x)).sum(), (part.adjoint(g) * x).sum())


@pytest.mark.parametrize(("n_heads", "n_values"), [(4, 4), (4, 2), (4, 1)])
def test_attention_is_a_sum_over_heads(n_heads: int, n_values: int) -> None:
    part, x, head_dim = attention(n_heads, n_values), randn(T, D), 4
    assert part.b_V is not None
    assert part.b_O is not None
    expected = part.b_O.expand(T, D).clone()
    for head in range(n_heads):
        group = head * n_values // n_heads
        rows = slice(group * head_dim, (group + 1) * head_dim)
        values = x @ part.W_V[rows].T + part.b_V[rows]
        out = part.W_O[:, head * head_dim : (head + 1) * head_dim]
        expected += part.pattern[head] @ values @ out.T
    assert torch.allclose(part.forward(x[:, None])[:, 0], expected)


def test_attention_adjoint_equals_autograd_with_biases() -> None:
    part, x = attention(4, 2), randn(T, 1, D).requires_grad_()
    g = randn(T, 1, D, seed=9)
    part.forward(x).backward(g)
    assert x.grad is not None
    assert torch.allclose(part.adjoint(g), x.grad)


def test_norm_ratio_fails_where_the_adjoint_holds() -> None:
    """The paper's code scales a pulled-back vector by |LN(x)| / |x|; on an uncentred residual with
    a gain that is far from the linear map's adjoint."""
    x = randn(1, D) + 3.0
    gain = randn(D, seed=1).abs() + 0.1
    layer_norm = torch.nn.functional.layer_norm
    scale = 1 / x.var(-1, unbiased=False, keepdim=True).sqrt()
    frozen = FrozenNorm(gain, None, scale.view(1, 1, 1), True)
    direction = randn(D, seed=2)
    exact = float(layer_norm(x, (D,), gain, eps=0.0) @ direction)
    ours = float((frozen.adjoint(direction.view(1, 1, D))[0, 0] * x[0]).sum())
    ratio = float(layer_norm(x, (D,), gain, eps=0.0).norm() / x.norm() * (x @ direction))
    assert abs(ours - exact) < 1e-9 * abs(exact)
    assert abs(ratio - exact) > 0.1 * abs(exact)


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_replay_gives_back_the_run(name: str, kind: str) -> None:
    sites, the_run = run(name)
    frozen, active = engine(name, kind)
    outputs = []
    for layer in range(sites.n_layers):
        skip = frozen.frozen.layers[layer].skip
        output = active.output[layer]
        outputs.append(
            (output if skip is None else output - frozen.inputs[layer] @ skip.T)[:, None]
        )
    start = the_run.resid[0][:, None]
    replay = frozen.frozen.replay(start, outputs, constants=True)
    for layer in range(sites.n_layers):
        assert relative(replay.reads[layer][:, 0], frozen.inputs[layer]) < 1e-5
        assert relative(replay.outputs[layer][:, 0], active.output[layer]) < 1e-5
    assert relative(replay.final[:, 0], frozen.final) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2", "olmo2", "falcon-new", "bloom"])
def test_sweep_is_the_adjoint_of_replay(name: str) -> None:
    """<u, J v> = <J^T u, v> for a vector pushed from any site to any target, and no edge from a
    later read point or a later position."""
    sites, _ = run(name, torch.float64)
    frozen = engine(name, "skip", torch.float64)[0].frozen
    n_positions, d_model = len(frozen.final_norm.scale), sites.d_model
    layer = torch.tensor([sites.n_layers, 2, 1, 1, 0])
    position = torch.tensor([6, 3, 5, 0, 4])
    targets = Targets(randn(5, d_model, seed=1), layer, position)
    swept = dict(frozen.sweep(targets))
    for site in (-1, 0, 1, 2):
        vector = randn(n_positions, 1, d_model, seed=site + 10)
        start = vector if site == -1 else torch.zeros_like(vector)
        outputs = [vector if site == n else None for n in range(sites.n_layers)]
        replay = frozen.replay(start, outputs, constants=False)
        reads = [*replay.reads, replay.final]
        for row in range(5):
            pushed = float(reads[layer[row]][position[row], 0] @ targets.vector[row])
            g = swept.get(site)
            pulled = 0.0
            if g is not None and row < g.shape[1]:
                pulled = float((g[:, row] * vector[: len(g), 0]).sum())
            assert pulled == pytest.approx(pushed, rel=1e-9, abs=1e-12)
            if site >= layer[row]:
                assert pushed == 0.0

"""The frozen linear model: adjoints, replay, and what the paper's shortcut for norms gets wrong."""

from __future__ import annotations

import pytest
import torch
import zoo
from setups import engine, relative, run
from torch import Tensor

from nnsight_transcoders.circuits.linear import (
    FoldedLayer,
    FrozenAttention,
    FrozenLayer,
    FrozenNorm,
    Targets,
)

T, B, D = 5, 3, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(centred: bool) -> FrozenNorm:
    return FrozenNorm(randn(D, seed=1), randn(D, seed=2), randn(T, 1, seed=3).abs(), centred)


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
    part, x, g = norm(centred), randn(B, D), randn(B, D, seed=9)
    positions = torch.tensor([4, 0, 2])
    whole = torch.zeros(B, T, D, dtype=torch.float64)
    whole[torch.arange(B), positions] = x
    pushed = part.linear(whole)[torch.arange(B), positions]
    assert torch.allclose(part.linear_at(x, positions), pushed)
    assert torch.allclose((g * pushed).sum(-1), (part.adjoint_at(g, positions) * x).sum(-1))


NORMS = [(None, None), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize(("n_heads", "n_values"), [(4, 4), (4, 2), (4, 1)])
def test_folded_attention_is_the_adjoint(n_heads: int, n_values: int, norms: tuple) -> None:
    """<g, A x> = <A^T g, x> for attention between norms of either kind, and autograd agrees."""
    first, last = (None if centred is None else norm(centred) for centred in norms)
    layer = FrozenLayer(attention(n_heads, n_values), first, last, None, None, None)
    folded = FoldedLayer(layer)
    x, g = randn(B, T, D).requires_grad_(), randn(B, T, D, seed=9)
    out = torch.zeros_like(g)
    folded.add_attention(out, folded.values(g))
    assert torch.allclose((g * layer.attend(x, constants=False)).sum(), (out * x).sum())
    layer.attend(x, constants=True).backward(g)
    assert x.grad is not None
    assert torch.allclose(out, x.grad)


@pytest.mark.parametrize("norms", NORMS)
def test_folded_skip_is_the_adjoint(norms: tuple) -> None:
    read, write = (None if centred is None else norm(centred) for centred in norms)
    layer = FrozenLayer(attention(4, 2), None, None, read, write, randn(D, D, seed=11))
    x, g = randn(B, T, D), randn(B, T, D, seed=9)
    assert layer.skip is not None
    out = (x if read is None else read.linear(x)) @ layer.skip.T
    out = out if write is None else write.linear(out)
    back = FoldedLayer(layer).skipped(g)
    assert back is not None
    assert torch.allclose((g * out).sum(), (back * x).sum())


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
    assert torch.allclose(part.forward(x), expected)


def test_norm_ratio_fails_where_the_adjoint_holds() -> None:
    """The paper's code scales a pulled-back vector by |LN(x)| / |x|; on an uncentred residual with
    a gain that is far from the linear map's adjoint."""
    x = randn(1, D) + 3.0
    gain = randn(D, seed=1).abs() + 0.1
    layer_norm = torch.nn.functional.layer_norm
    scale = 1 / x.var(-1, unbiased=False, keepdim=True).sqrt()
    frozen = FrozenNorm(gain, None, scale, True)
    direction = randn(D, seed=2)
    exact = float(layer_norm(x, (D,), gain, eps=0.0) @ direction)
    ours = float((frozen.adjoint_at(direction[None], torch.tensor([0]))[0] * x[0]).sum())
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
        skip, output = frozen.frozen.layers[layer].skip, active.output[layer]
        outputs.append(output if skip is None else output - frozen.inputs[layer] @ skip.T)
    replay = frozen.frozen.replay(the_run.resid[0], outputs, constants=True)
    for layer in range(sites.n_layers):
        assert relative(replay.reads[layer], frozen.inputs[layer]) < 1e-5
        assert relative(replay.outputs[layer], active.output[layer]) < 1e-5
    assert relative(replay.final, frozen.final) < 1e-5


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
    swept = {site: g.clone() for site, g in frozen.sweep(targets)}
    for site in (-1, 0, 1, 2):
        vector = randn(n_positions, d_model, seed=site + 10)
        start = vector if site == -1 else torch.zeros_like(vector)
        outputs = [vector if site == n else None for n in range(sites.n_layers)]
        replay = frozen.replay(start, outputs, constants=False)
        reads = [*replay.reads, replay.final]
        every = torch.arange(n_positions)
        added = vector if site == -1 else frozen.to_stream(site, vector, every)
        for row in range(5):
            pushed = float(reads[layer[row]][position[row]] @ targets.vector[row])
            g = swept.get(site)
            pulled = 0.0
            if g is not None and row < len(g):
                pulled = float((g[row] * added[: g.shape[1]]).sum())
            assert pulled == pytest.approx(pushed, rel=1e-9, abs=1e-12)
            if site >= layer[row]:
                assert pushed == 0.0

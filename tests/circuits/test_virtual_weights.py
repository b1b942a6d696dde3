"""Virtual weights, OV pull-backs and the search for connections against dense products."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from setups import engine, model, relative, run, transcoders
from torch import Tensor

from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits import connections
from nnsight_transcoders.circuits.connections import Connection, strongest_connections
from nnsight_transcoders.circuits.linear import FrozenLayer, FrozenNorm
from nnsight_transcoders.circuits.virtual_weights import (
    de_embed,
    logits_of,
    pull_back,
    push_forward,
    read_vectors,
    virtual_weights,
    write_vectors,
)
from nnsight_transcoders.circuits.weights import de_embeddings, logit_effects
from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.sites import resolve_sites

NAMES = ["gpt2", "llama", "qwen3", "gemma2", "olmo2", "gpt-neox", "phi3", "falcon-new", "bloom"]
ALL = range(24)


def unit(norm: FrozenNorm | None) -> FrozenNorm | None:
    """A frozen norm with its denominators at one."""
    return None if norm is None else replace(norm, scale=torch.ones(1, 1, dtype=norm.gain.dtype))


def head_layer(layer: FrozenLayer, heads: Any) -> FrozenLayer:
    """A block of the run's frozen model (which reproduces that run) without denominators, at one
    position, where ``heads`` alone pay attention: fully."""
    pattern = torch.zeros(layer.attention.pattern.shape[0], 1, 1, dtype=layer.attention.W_O.dtype)
    pattern[heads] = 1.0
    return FrozenLayer(
        attention=replace(layer.attention, pattern=pattern),
        attention_norm=unit(layer.attention_norm),
        attention_post_norm=unit(layer.attention_post_norm),
        read=unit(layer.read),
        write=unit(layer.write),
        skip=None,
    )


def dense(name: str, kind: str, source: int, target: int, head: Any = None, **config: Any) -> Any:
    """All weights ``(F, F)`` of two layers by pushing every decoder row up, part by part; None
    where nothing gets from one to the other."""
    layers = engine(name, kind, **config)[0].frozen.layers
    chosen = transcoders(name, kind, **config)
    parallel = run(name)[0].parallel
    decoder = chosen.load(source).W_dec.detach()
    slots = decoder[:, None] if decoder.dim() == 2 else decoder
    stream, heads = torch.zeros(24, 1, decoder.shape[-1]), slice(None)
    if head is not None:
        heads = slice(None) if head[1] is None else head[1]
        reached = head[0] < (target if parallel else target + 1)
        if not reached:
            return None
    limit, found = target if head is None else head[0], False
    for j, layer in enumerate(chosen.targets(source)):
        if layer < limit:
            write, found = unit(layers[layer].write), True
            rows = slots[:, [j]]
            stream = stream + (rows if write is None else write.linear(rows))
    if not found:
        return None
    if head is not None:
        stream = head_layer(layers[head[0]], heads).attend(stream, constants=False)
    read = unit(layers[target].read)
    stream = stream if read is None else read.linear(stream)
    return stream[:, 0] @ chosen.load(target).W_enc.detach().T


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_virtual_weights_are_the_dense_products(name: str, kind: str) -> None:
    chosen = transcoders(name, kind)
    for source, target, head in [
        (0, 1, None),
        (0, 2, None),
        (0, 2, (1, 3)),
        (1, 2, None),
        (0, 2, (2, 1)),
        (0, 2, (1, None)),
        (0, 1, (1, 0)),
    ]:
        expected = dense(name, kind, source, target, head)
        if expected is None:
            with pytest.raises(InputError, match="cannot reach"):
                virtual_weights(model(name), chosen, (source, ALL), (target, ALL), head=head)
            continue
        found = virtual_weights(model(name), chosen, (source, [5, 2]), (target, ALL), head=head)
        assert relative(found, expected[[5, 2]]) < 1e-5


@pytest.mark.parametrize(("input_site", "output_site"), [("R", "O'"), ("N0", "O'"), ("N0", "O")])
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_virtual_weights_at_every_site(name: str, input_site: str, output_site: str) -> None:
    config = {"input_site": input_site, "output_site": output_site}
    found = virtual_weights(
        model(name), transcoders(name, "per-layer", **config), (0, ALL), (2, ALL)
    )
    assert relative(found, dense(name, "per-layer", 0, 2, **config)) < 1e-5


def test_products_written_out_for_gpt2_and_gemma2() -> None:
    """From the modules' own parameters."""
    module, chosen = model("gpt2")._module, transcoders("gpt2", "per-layer")
    block = module.transformer.h[1]
    written = chosen[0].W_dec.detach()
    written = (written - written.mean(1, keepdim=True)) * block.ln_1.weight
    head = slice(2 * 8, 3 * 8)
    moved = written @ block.attn.c_attn.weight[:, 64:][:, head] @ block.attn.c_proj.weight[head]
    moved = (moved - moved.mean(1, keepdim=True)) * block.ln_2.weight
    found = virtual_weights(model("gpt2"), chosen, (0, ALL), (1, ALL), head=(1, 2))
    assert relative(found, (moved @ chosen[1].W_enc.T).detach()) < 1e-5

    module, chosen = model("gemma2")._module, transcoders("gemma2", "per-layer")
    blocks = module.model.layers
    written = chosen[0].W_dec * (1 + blocks[0].post_feedforward_layernorm.weight)
    direct = written * (1 + blocks[2].pre_feedforward_layernorm.weight) @ chosen[2].W_enc.T
    found = virtual_weights(model("gemma2"), chosen, (0, ALL), (2, ALL))
    assert relative(found, direct.detach()) < 1e-5
    attention = blocks[1].self_attn  # query head 3 uses value head 1 of 2
    moved = written * (1 + blocks[1].input_layernorm.weight) @ attention.v_proj.weight[16:].T
    moved = moved @ attention.o_proj.weight[:, 48:].T
    moved = moved * (1 + blocks[1].post_attention_layernorm.weight)
    moved = moved * (1 + blocks[2].pre_feedforward_layernorm.weight) @ chosen[2].W_enc.T
    found = virtual_weights(model("gemma2"), chosen, (0, ALL), (2, ALL), head=(1, 3))
    assert relative(found, moved.detach()) < 1e-5


@pytest.mark.parametrize("name", [*NAMES, "qwen2", "stablelm-parallel", "mistral"])
def test_pull_back_is_autograd_on_the_frozen_model(name: str) -> None:
    """Biases are there (Qwen 2, GPT-2) and have no gradient."""
    layers = engine(name, "per-layer", torch.float64)[0].frozen.layers
    vectors = torch.randn(3, 32, dtype=torch.float64)
    for layer, head in [(0, 0), (1, 3), (2, 1), (1, None)]:
        block = head_layer(layers[layer], slice(None) if head is None else head)
        x = torch.randn(3, 1, 32, dtype=torch.float64, requires_grad=True)
        out = block.attend(x, constants=True)[:, 0]
        (expected,) = torch.autograd.grad((out * vectors).sum(), x)
        found = pull_back(model(name, torch.float64), vectors, layer, head)
        assert relative(found, expected[:, 0]) < 1e-9
        forward = push_forward(model(name, torch.float64), x[:, 0], layer, head)
        assert relative(forward, block.attend(x, constants=False)[:, 0].detach()) < 1e-9


def test_heads_sum_to_all_heads() -> None:
    vectors = torch.randn(2, 32)
    each = [pull_back(model("llama"), vectors, 1, head) for head in range(4)]
    assert relative(pull_back(model("llama"), vectors, 1), sum(each)) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_vectors_at_the_vocabulary(name: str, kind: str) -> None:
    nn_model, chosen = model(name), transcoders(name, kind)
    module = nn_model._module
    read = read_vectors(nn_model, chosen, 2, [3, 4])
    assert relative(de_embed(nn_model, read), de_embeddings(nn_model, chosen, 2, [3, 4])) < 1e-5
    through = de_embed(nn_model, pull_back(nn_model, read, 1, 2))
    by_hand = read @ push_forward(nn_model, torch.eye(32), 1, 2).T
    embedding = module.get_input_embeddings().weight.detach()
    assert relative(through, by_hand @ embedding.T) < 1e-4
    write = write_vectors(nn_model, chosen, 1, [3, 4])
    expected = logit_effects(nn_model, chosen, 1, [3, 4])
    assert relative(logits_of(nn_model, write), expected) < 1e-5


# -- connections ---------------------------------------------------------------------------------


def enumerated(name: str, kind: str, head: Any, keep: Any) -> list[Connection]:
    """All connections that ``keep``, by magnitude."""
    found = []
    for source, target in product(range(3), range(3)):
        weights = dense(name, kind, source, target, head)
        if weights is not None:
            found += [
                Connection(source, i, target, j, float(weights[i, j])) for i, j in product(ALL, ALL)
            ]
    found = [connection for connection in found if keep(connection)]
    return sorted(found, key=lambda c: -abs(c.weight))


def same(found: list[Connection], expected: list[Connection]) -> bool:
    assert [c.weight for c in found] == pytest.approx([c.weight for c in expected], rel=1e-4)
    return {(c.source_layer, c.source, c.target_layer, c.target) for c in found} == {
        (c.source_layer, c.source, c.target_layer, c.target) for c in expected
    }


@pytest.mark.parametrize("head", [None, (1, 2), (2, None)])
@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox"])
def test_connections_are_those_of_the_dense_matrix(
    name: str, kind: str, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CHUNK_ROWS", 7)
    nn_model, chosen = model(name), transcoders(name, kind)
    up = connections.top_connections(nn_model, chosen, 0, 3, head=head, k=9)
    assert same(
        up, enumerated(name, kind, head, lambda c: (c.source_layer, c.source) == (0, 3))[:9]
    )
    down = connections.top_connections(nn_model, chosen, 2, 5, direction="down", head=head, k=30)
    assert same(
        down, enumerated(name, kind, head, lambda c: (c.target_layer, c.target) == (2, 5))[:30]
    )
    found = strongest_connections(nn_model, chosen, 25, head=head)
    assert same(found, enumerated(name, kind, head, lambda _: True)[:25])
    chosen_layers = strongest_connections(nn_model, chosen, 5, sources=[0], targets=[2], head=head)
    expected = enumerated(name, kind, head, lambda c: (c.source_layer, c.target_layer) == (0, 2))[
        :5
    ]
    assert same(chosen_layers, expected)


def test_the_search_leaves_out_what_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """One strong feature on each side: few of the chunk products are made."""
    chosen = random_transcoders(run("llama")[1], "per-layer", d_transcoder=64)
    with torch.no_grad():
        chosen[0].W_dec[40] *= 50
        chosen[2].W_enc[9] *= 50
    monkeypatch.setattr(connections, "CHUNK_ROWS", 4)
    offered: list[Tensor] = []
    add = connections._Best.add
    monkeypatch.setattr(
        connections._Best, "add", lambda self, *a: (offered.append(a[-1]), add(self, *a))[1]
    )
    (found,) = strongest_connections(model("llama"), chosen, 1)
    assert (found.source_layer, found.source, found.target_layer, found.target) == (0, 40, 2, 9)
    assert len(offered) < 3 * 16 * 16 / 4


def test_damaged_weights_are_refused() -> None:
    chosen = random_transcoders(run("llama")[1], "per-layer", d_transcoder=8)
    with torch.no_grad():
        chosen.source.load(1).W_enc[3, 0] = float("nan")
    with pytest.raises(CheckpointError, match="layer 1's encoder"):
        connections.top_connections(model("llama"), chosen, 0, 3)
    with pytest.raises(CheckpointError, match="layer 1's encoder"):
        strongest_connections(model("llama"), chosen, 3)


def test_prints_a_connection() -> None:
    assert str(Connection(0, 3, 2, 7, -1.5)) == "-1.5000  feature 0 3 -> feature 2 7"


def test_refuses() -> None:
    nn_model, chosen = model("llama"), transcoders("llama", "per-layer")
    with pytest.raises(InputError, match="heads 0 to 3"):
        virtual_weights(nn_model, chosen, (0, [0]), (2, [0]), head=(1, 4))
    with pytest.raises(InputError, match="layers 0 to 2"):
        pull_back(nn_model, torch.zeros(1, 32), 3)
    with pytest.raises(InputError, match=r"\(n, 32\)"):
        de_embed(nn_model, torch.zeros(32))
    with pytest.raises(InputError, match="direction"):
        connections.top_connections(nn_model, chosen, 0, 0, direction="left")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k must"):
        strongest_connections(nn_model, chosen, 0)
    with pytest.raises(InputError, match="features 0 to 23"):
        connections.top_connections(nn_model, chosen, 0, 24)
    assert connections.top_connections(nn_model, chosen, 2, 0) == []
    assert resolve_sites(nn_model).n_layers == 3


def test_autoencoders_are_refused() -> None:
    chosen = transcoders("llama", "per-layer", input_site="O", output_site="O")
    with pytest.raises(InputError, match="is a sparse autoencoder"):
        read_vectors(model("llama"), chosen, 1, [0])

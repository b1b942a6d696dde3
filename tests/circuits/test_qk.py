"""QK attribution: the terms sum to the model's own score, and are what the weights say."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import pytest
import torch
from setups import IDS, model, relative, transcoders
from torch import Tensor
from torch.nn import functional

from nnsight_transcoders.circuits.contributions import CircuitRun
from nnsight_transcoders.circuits.qk import qk_attribution
from nnsight_transcoders.circuits.scores import AttentionScores
from nnsight_transcoders.circuits.stream import Component, stream_components
from nnsight_transcoders.errors import InputError, SiteError

NAMES = ["gpt2", "gpt-neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
NAMES += ["olmo2", "opt", "stablelm", "stablelm-parallel", "mixtral"]

#: Models that do not use transformers' attention interface, and where their softmax gets scores.
OWN = {
    "gpt-neo": "self__attn_0.source.nn_functional_softmax_0",
    "falcon": "F_softmax_0",
    "falcon-new": "F_softmax_0",
    "falcon-alibi": "F_softmax_1",
    "bloom": "F_softmax_0",
}
ALIBI = ["falcon-alibi", "bloom"]


@cache
def circuit(
    name: str, kind: str = "per-layer", dtype: torch.dtype = torch.float32, **config: Any
) -> CircuitRun:
    return CircuitRun.collect(model(name, dtype), transcoders(name, kind, dtype, **config), IDS)


@cache
def model_scores(name: str, layer: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(H, T, T)``: scores inside the model's own eager attention; 0 where they are masked."""
    nn_model, path = model(name, dtype), circuit(name, dtype=dtype).sites.layers[layer].attention
    own: Any = nn_model._module.get_submodule(path)
    with nn_model.trace(torch.tensor([IDS])):
        source = nn_model.get(path).source
        if name in OWN:
            scores = attrgetter(OWN[name])(source).inputs[0][0].clone().save()
        else:
            scores = source.attention_interface_1.source.torch_matmul_0.output.clone().save()
    if name in OWN:
        return scores[0].detach().masked_fill(scores[0] < -1e9, 0)
    return scores[0].detach() * (1.0 if name == "opt" else own.scaling)  # OPT scales its queries


@pytest.mark.parametrize("name", [*NAMES, *OWN])
@pytest.mark.parametrize("layer", [1, 2])
def test_terms_sum_to_the_models_own_score(name: str, layer: int) -> None:
    expected = model_scores(name, layer)
    scores = AttentionScores(circuit(name), layer).scores
    if name in OWN:
        assert int((expected != 0).sum()) > 4 * len(IDS)
        scores = scores.masked_fill(expected == 0, 0)
    assert relative(scores, expected) < 1e-5
    for head, source, destination in [(0, 3, 5), (3, 6, 6), (1, 4, -1)]:
        found = qk_attribution(circuit(name), layer, head, source, destination)
        size = float(found.terms.abs().max())
        assert found.terms.shape == (len(found.destinations), len(found.sources))
        want = float(expected[head, destination, source])
        assert float(found.terms.sum()) == pytest.approx(want, abs=1e-4 * size)
        assert found.score == pytest.approx(want, abs=1e-4 * size)
        assert sum(found.by_kind().values()) == pytest.approx(found.score, abs=1e-4 * size)


@pytest.mark.parametrize("kind", ["skip", "cross-layer"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt-neox", "olmo2", *OWN])
def test_in_float64_and_for_every_kind_of_set(name: str, kind: str) -> None:
    """Norms and rotary embeddings inside Hugging Face's models stay in float32."""
    run = circuit(name, kind, torch.float64)
    found = qk_attribution(run, 1, 2, 2, 5)
    size = float(found.terms.abs().max())
    expected = float(model_scores(name, 1, torch.float64)[2, 5, 2])
    assert float(found.terms.sum()) == pytest.approx(found.score, abs=1e-6 * size)
    assert found.score == pytest.approx(expected, abs=1e-5 * size)
    kinds = {component.kind for component in found.sources}
    assert ("skip" in kinds) == (kind == "skip")


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox", "falcon-new", "bloom"])
@pytest.mark.parametrize(("input_site", "output_site"), [("N1", "O"), ("R", "O'")])
def test_components_sum_to_the_stream(
    name: str, kind: str, input_site: str, output_site: str
) -> None:
    run = circuit(name, kind, input_site=input_site, output_site=output_site)
    for layer in range(3):
        names, vectors = stream_components(run, layer, 4)
        assert len(set(names)) == len(names) == len(vectors)
        assert relative(vectors.sum(0), run.run.resid[layer][4]) < 1e-5


def test_products_written_out_for_gpt2() -> None:
    """Layer 0: tokens and positions through ln_1 at the run's denominators and c_attn."""
    module, run = model("gpt2")._module, circuit("gpt2")
    block = module.transformer.h[0]
    found = qk_attribution(run, 0, 2, 1, 5)
    head = slice(2 * 8, 3 * 8)
    weight, bias = block.attn.c_attn.weight.detach(), block.attn.c_attn.bias.detach()
    resid = run.run.resid[0]

    def side(position: int, offset: int) -> Tensor:
        columns = weight[:, 32 * offset : 32 * offset + 32][:, head]
        rows = torch.stack([run.run.embedding[position], module.transformer.wpe.weight[position]])
        scale = resid[position].var(correction=0).add(block.ln_1.eps).rsqrt()
        rows = (rows - rows.mean(1, keepdim=True)) * scale * block.ln_1.weight
        constant = block.ln_1.bias @ columns + bias[32 * offset : 32 * offset + 32][head]
        return torch.cat([rows @ columns, constant[None]]).detach()

    expected = side(5, 0) @ side(1, 1).T / 8**0.5
    assert relative(found.terms, expected) < 1e-5
    assert found.destinations == (
        Component("token", -1, 5),
        Component("position", -1, 5),
        Component("bias", 0, 5),
    )


def test_top_terms() -> None:
    found = qk_attribution(circuit("llama"), 2, 1, 2, 4)
    top = found.top(7)
    values = [abs(value) for *_, value in top]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(float(found.terms.abs().max()))
    destination, source, value = top[0]
    row, column = found.destinations.index(destination), found.sources.index(source)
    assert float(found.terms[row, column]) == value
    assert str(Component("feature", 1, 4, 17)) == "feature 1 17 @4"
    assert len(found.top(10**6)) == found.terms.numel()


@pytest.mark.parametrize("name", ["qwen3", "gpt-neo", "bloom"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    run = circuit(name)
    module = run.model._module
    before = [len(child._forward_hooks) for child in module.modules()]
    chosen = module.config._attn_implementation
    qk_attribution(run, 1, 0, 0)
    assert [len(child._forward_hooks) for child in module.modules()] == before
    assert module.config._attn_implementation == chosen
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("name", [*OWN])
def test_own_scores_in_half_precision(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        found = qk_attribution(circuit(name, dtype=dtype), 1, 2, 3, 5)
        size = float(found.terms.abs().max())
        assert float(found.terms.sum()) == pytest.approx(found.score, abs=5e-2 * size)


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_is_a_term_of_its_own(name: str) -> None:
    """Four heads have the slopes 1/4, 1/16, ...; Falcon scales them as it scales the product, and
    its eager form adds them twice: its model has put them into the mask already."""
    run = circuit(name)
    for head in range(4):
        found = qk_attribution(run, 2, head, 3, 5)
        here, there = Component("position", 2, 5), Component("position", 2, 3)
        assert (found.destinations[-1], found.sources[-1]) == (here, there)
        scale = 2 * 8**-0.5 if name == "falcon-alibi" else 1.0
        assert float(found.terms[-1, -1]) == pytest.approx(3 * scale / 4 ** (head + 1))
        assert not found.terms[-1, :-1].any() and not found.terms[:-1, -1].any()


@pytest.mark.parametrize("name", ["gpt-neo", "falcon", "falcon-new", "gpt2"])
def test_no_term_of_its_own_without_alibi(name: str) -> None:
    found = qk_attribution(circuit(name), 2, 1, 3, 5)
    assert found.destinations[-1] == Component("bias", 2, 5)
    assert found.sources[-1] == Component("bias", 2, 3)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda scores: scores.tril(), "neither calls"),
        (lambda scores: functional.softmax((50 * scores).sin(), -1), "cannot be taken apart"),
    ],
)
def test_refuses_own_scores_that_it_cannot_express(
    monkeypatch: pytest.MonkeyPatch, pattern: Callable[[Tensor], Tensor], message: str
) -> None:
    """Attention without softmax, and one whose softmax does not get a scaled product."""
    run = circuit("gpt-neo")
    own: Any = run.model._module.get_submodule(run.sites.layers[1].attention)

    def forward(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        del args, options
        query, key, value = (p(x)[:, None] for p in (own.q_proj, own.k_proj, own.v_proj))
        found = pattern(query @ key.transpose(-1, -2))
        return own.out_proj((found @ value)[:, 0]), found

    monkeypatch.setattr(own, "forward", forward)
    with pytest.raises(SiteError, match=message):
        qk_attribution(run, 1, 0, 0)


def test_refuses_scores_that_have_another_term() -> None:
    run = copy(circuit("llama"))
    run.run = replace(run.run, pattern=[pattern.roll(1, -1) for pattern in run.run.pattern])
    with pytest.raises(SiteError, match="cannot be taken apart"):
        qk_attribution(run, 1, 0, 0)


def test_refuses_what_is_not_there() -> None:
    run = circuit("llama")
    for arguments, message in [
        ((3, 0, 0), "layer must be 0 to 2"),
        ((0, 4, 0), "head must be 0 to 3"),
        ((0, 0, 9), "outside the prompt"),
        ((0, 0, 5, 2), "does not look ahead"),
    ]:
        with pytest.raises(InputError, match=message):
            qk_attribution(run, *arguments)
    with pytest.raises(InputError, match="k must"):
        qk_attribution(run, 0, 0, 0).top(0)

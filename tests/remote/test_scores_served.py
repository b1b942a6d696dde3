"""QK attribution of models whose weights the client does not use, on every architecture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

sys.path.insert(0, str(Path(__file__).parents[1] / "circuits"))

from setups import IDS, model, transcoders

from nnsight_transcoders import CircuitRun, qk_attribution
from nnsight_transcoders.circuits import attention_weights
from nnsight_transcoders.circuits.attention_weights import probed_weight
from nnsight_transcoders.errors import SiteError


def runs(name: str, dtype: torch.dtype = torch.float32) -> tuple[CircuitRun, CircuitRun]:
    """With the weights from the server, and with the model's own."""
    nn_model, chosen = model(name, dtype), transcoders(name, "per-layer", dtype)
    return (
        CircuitRun.collect(nn_model, chosen, IDS, remote="local", weights="server"),
        CircuitRun.collect(nn_model, chosen, IDS),
    )


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_the_terms_are_those_of_a_model_that_is_here(name: str) -> None:
    there, here = runs(name)
    for layer, head, source, destination in [(1, 2, 3, 5), (2, 1, 6, 6)]:
        found = qk_attribution(there, layer, head, source, destination)
        expected = qk_attribution(here, layer, head, source, destination)
        assert (found.destinations, found.sources) == (expected.destinations, expected.sources)
        size = float(expected.terms.abs().max())
        torch.testing.assert_close(found.terms, expected.terms, rtol=0, atol=1e-5 * size)
        assert found.score == pytest.approx(expected.score, abs=1e-5 * size)


@pytest.mark.parametrize("name", ["qwen3", "bloom", "gpt2"])
def test_in_half_precision(name: str) -> None:
    there, here = runs(name, torch.bfloat16)
    found, expected = (qk_attribution(run, 2, 1, 3, 5) for run in (there, here))
    size = float(expected.terms.abs().max())
    torch.testing.assert_close(found.terms, expected.terms, rtol=0, atol=2e-2 * size)
    assert float(found.terms.sum()) == pytest.approx(found.score, abs=5e-2 * size)


def test_the_model_is_left_as_it_was() -> None:
    there, _ = runs("qwen3")
    module = there.model._module
    before = {name: vars(child).copy() for name, child in module.named_modules()}
    chosen = module.config._attn_implementation
    qk_attribution(there, 1, 0, 0)
    assert {name: vars(child) for name, child in module.named_modules()} == before
    assert module.config._attn_implementation == chosen


def test_a_map_that_reads_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries made from a multiple of the input: not what the server was asked for."""
    there, _ = runs("llama")
    own: Any = there.model._module.get_submodule(there.sites.layers[1].attention)
    kind = type(own)

    class Other(kind):
        def forward(self, hidden_states: Any, *args: Any, **options: Any) -> Any:
            return super().forward(hidden_states * 2, *args, **options)

    monkeypatch.setattr(own, "__class__", Other)
    with pytest.raises(SiteError, match="q_proj does not read the attention's input"):
        qk_attribution(there, 1, 0, 0)


# -- maps that can only be called ----------------------------------------------------------------


def linear(dtype: torch.dtype, *, bias: bool) -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(10, 7, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_by_calling(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch):
    """In parts of a basis, whole or some rows of it."""
    monkeypatch.setattr(attention_weights, "BASIS_ROWS", 4)
    module, sizes = linear(dtype, bias=bias), []

    def call(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return module(x)

    for rows in (None, torch.tensor([5, 0])):
        chosen = slice(None) if rows is None else rows
        weight, constant = probed_weight(call, 10, torch.empty(0, dtype=dtype), dtype, rows)
        near: dict[str, Any] = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
        torch.testing.assert_close(weight, module.weight[chosen], **near)
        assert (constant is None) == (not bias)
        if constant is not None:
            torch.testing.assert_close(constant, module.bias[chosen])
    assert sizes == 2 * [1, 4, 4, 2]

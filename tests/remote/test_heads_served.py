"""Heads whose maps stay on a server: the numbers of a model that is here, on every architecture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

sys.path.insert(0, str(Path(__file__).parents[1] / "circuits"))

from setups import IDS, model, transcoders

from nnsight_transcoders import CircuitRun, Where, top_paths
from nnsight_transcoders.errors import SiteError


def runs(name: str, dtype: torch.dtype = torch.float32) -> tuple[CircuitRun, CircuitRun]:
    """With the maps on the server, and here."""
    nn_model, chosen = model(name, dtype), transcoders(name, "skip", dtype)
    return (
        CircuitRun.collect(nn_model, chosen, IDS, remote="local", weights="server"),
        CircuitRun.collect(nn_model, chosen, IDS),
    )


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_paths(name: str) -> None:
    there, here = runs(name)
    options: dict[str, Any] = {"depth": 3, "beam": 10, "where": ~Where(kinds={"bias", "error"})}
    found, expected = (top_paths(run, run.token(5), **options) for run in (there, here))
    heads: dict[str, Any] = {"depth": 2, "where": Where(kinds={"attention"})}
    found += top_paths(there, there.token(5), **heads)
    expected += top_paths(here, here.token(5), **heads)
    size = max(abs(path.value) for path in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5 * size)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_stream_is_the_sum_of_its_parts(name: str) -> None:
    """Attention's linear part and its biases, of a run without its maps."""
    there, here = runs(name)
    for layer in range(zoo.N_LAYERS):
        for part in ("attention_output", "attention_bias"):
            found, expected = (getattr(run, part)(layer) for run in (there, here))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_half_precision() -> None:
    there, here = runs("gemma2", torch.bfloat16)
    found, expected = (run.contributions(run.token(5)) for run in (there, here))
    assert [str(one) for one in found] == [str(one) for one in expected]
    size = max(abs(one.value) for one in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-2 * size)


def test_an_attention_that_is_something_else_is_refused() -> None:
    """Its output is not pattern x values x output: the server finds out."""
    there, _ = runs("llama")
    target = there.token(5)
    values: Any = there.model._module.model.layers[1].self_attn.v_proj
    handle = values.register_forward_hook(lambda *call: call[2] ** 3)
    try:
        with pytest.raises(SiteError, match="cannot be written as pattern x values x output"):
            there.contributions(target)
    finally:
        handle.remove()

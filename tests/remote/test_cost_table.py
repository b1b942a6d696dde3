"""The documentation's cost table is what its command prints, from shapes that are the models'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.cost_table import cost_table
from nnsight_transcoders.remote.payload import KNOWN_SHAPES, ModelShape, estimate_payload, megabytes
from nnsight_transcoders.sites import resolve_sites

PAGE = Path(__file__).parents[2] / "docs" / "remote.md"

_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
CONFIGS = {
    "GPT-2": transformers.GPT2Config(),
    "Gemma-2-2B": transformers.Gemma2Config(
        hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, head_dim=256
    ),
    "Llama-3.1-8B": transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
    ),
    "Llama-3.1-70B": transformers.LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, **_LLAMA
    ),
}


def test_the_page_shows_what_the_command_prints():
    shown = PAGE.read_text(encoding="utf-8").partition("<!-- cost table -->\n")[2]
    shown = shown.partition("<!-- end -->")[0].splitlines()
    printed = cost_table().splitlines()
    assert len(shown) == len(printed) and shown[:2] == printed[:2]
    for line, expected in zip(shown[2:], printed[2:], strict=True):
        for cell, other in zip(line.split("|")[1:-1], expected.split("|")[1:-1], strict=True):
            assert [number(part) for part in cell.split("/")] == pytest.approx(
                [number(part) for part in other.split("/")], rel=0.05
            ), f"{line}: run python -m nnsight_transcoders.remote.cost_table"


def number(text: str) -> float:
    """``"4.0 MB"`` in bytes; a row's name stands for itself."""
    value, _, unit = text.strip().partition(" ")
    scale = {"kB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit)
    return float(value) * scale if scale else float(len(text))


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_the_shapes_are_the_models(name):
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    found = ModelShape.of(module, resolve_sites(module))
    known = KNOWN_SHAPES[name]
    numbers = ("n_layers", "d_model", "n_heads", "vocab_size", "n_norms", "streams")
    for field in (*numbers, "map_elements"):
        assert getattr(found, field) == getattr(known, field), field
    assert found.n_modules == pytest.approx(known.n_modules, abs=2)


def test_more_of_everything_costs_more():
    shape = KNOWN_SHAPES["Llama-3.1-8B"]
    for kind in ("collect", "edges", "client-side features", "activations"):
        small = estimate_payload(kind, shape, n_positions=16)
        large = estimate_payload(kind, shape, n_positions=64)
        assert large.up > small.up and large.down > small.down
    one = estimate_payload("weights", shape, n_layers=1)
    assert estimate_payload("weights", shape, n_layers=1, skip=True).up > one.up
    assert estimate_payload("weights", shape, n_layers=2).up == pytest.approx(2 * one.up, rel=1e-3)
    with pytest.raises(InputError, match="unknown kind"):
        estimate_payload("everything", shape)  # type: ignore[arg-type]


def test_bytes_for_people():
    assert [megabytes(n) for n in (1500, 2.5e6, 3.25e9)] == ["1.5 kB", "2.5 MB", "3.25 GB"]

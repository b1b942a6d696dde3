"""Sparse activations of batches against what circuits are traced with, on several architectures."""

from __future__ import annotations

from typing import Any

import pytest
import setups
import torch

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.features import activations
from nnsight_transcoders.features.activations import ActivationReader
from nnsight_transcoders.sites import resolve_sites

K = 7
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "per-layer", {}),
    ("gpt2", "skip", {}),
    ("gpt-neox", "cross-layer", {}),
    ("opt", "per-layer", {}),
    ("falcon-new", "per-layer", {}),
    ("olmo2", "skip", {}),
    ("mixtral", "per-layer", {}),
    ("gemma2", "per-layer", {"leading_positions": 2}),
    ("llama", "per-layer", {"input_site": "R"}),
    ("llama", "per-layer", {"input_site": "N0"}),
    ("llama", "cross-layer", {"activation": "jointtopk", "k": K}),
    ("llama", "per-layer", {"activation": "jointtopk", "k": K}),
]


def reader_of(family: str, kind: str, config: dict[str, Any]) -> ActivationReader:
    model, chosen = setups.model(family), setups.transcoders(family, kind, **config)
    return ActivationReader(model, resolve_sites(model._module), chosen, chosen.layers)


@pytest.mark.parametrize(("family", "kind", "config"), CASES)
def test_they_are_those_of_circuits(
    family: str, kind: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", 100)  # a few rows at a time
    _, expected = setups.engine(family, kind, **config)
    reader = reader_of(family, kind, config)
    assert reader.leading_positions == config.get("leading_positions", 0)
    ids = torch.tensor([setups.IDS, setups.IDS[::-1]])
    measured = torch.ones_like(ids, dtype=torch.bool)
    measured[:, : reader.leading_positions] = False
    found = reader(ids, measured)
    mine = found.context == 0
    assert found.context.unique().tolist() == [0, 1]
    start = 0
    for layer, features in expected.layers.items():
        width = setups.transcoders(family, kind, **config).config(layer).d_transcoder
        here = mine & (found.feature >= start) & (found.feature < start + width)
        dense = torch.zeros(len(setups.IDS), width)
        dense[found.position[here], found.feature[here] - start] = found.value[here]
        wanted = torch.zeros(len(setups.IDS), width)
        wanted[features.position, features.index] = features.activation.float()
        torch.testing.assert_close(dense, wanted, rtol=1e-4, atol=1e-5)
        start += width


def test_only_measured_positions() -> None:
    reader = reader_of("llama", "per-layer", {})
    ids = torch.tensor([setups.IDS])
    measured = torch.zeros_like(ids, dtype=torch.bool)
    measured[0, [1, 3]] = True
    assert reader(ids, measured).position.unique().tolist() == [1, 3]
    assert len(reader(ids, torch.zeros_like(measured)).value) == 0


def test_some_layers_of_a_joint_choice_are_refused() -> None:
    model = setups.model("llama")
    chosen = setups.transcoders("llama", "per-layer", activation="jointtopk", k=K)
    with pytest.raises(InputError, match="collect all of them"):
        ActivationReader(model, resolve_sites(model._module), chosen, [0])

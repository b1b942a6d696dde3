"""Features chosen over all layers together: the choice, circuits, and where it cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import setups
import torch
from torch import Tensor

from nnsight_transcoders.activations import keep_joint, make_activation
from nnsight_transcoders.attachment.edit import attach
from nnsight_transcoders.circuits import active
from nnsight_transcoders.circuits.active import largest_per_position
from nnsight_transcoders.circuits.attribution import attribute
from nnsight_transcoders.errors import ConfigError, InputError

K = 7


def dense_choice(chosen: Any, inputs: list[Tensor]) -> dict[int, Tensor]:
    """Every feature of every layer ranked, position by position."""
    acts = {layer: chosen[layer].encode(inputs[layer]) for layer in chosen.layers}
    kept = {layer: torch.zeros_like(a) for layer, a in acts.items()}
    for position in range(len(inputs[0])):
        ranked = sorted(
            (
                (float(a[position, i] * chosen[layer].W_dec[i].norm()), layer, i)
                for layer, a in acts.items()
                for i in range(a.shape[1])
            ),
            reverse=True,
        )
        for score, layer, i in ranked[:K]:
            if score > 0:
                kept[layer][position, i] = acts[layer][position, i]
    return kept


@pytest.mark.parametrize("kind", ["cross-layer", "per-layer"])
@pytest.mark.parametrize("chunk", [1, active.CHUNK_ELEMENTS])
def test_active_features(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "CHUNK_ELEMENTS", chunk)
    engine, found = setups.engine("llama", kind, activation="jointtopk", k=K)
    chosen = setups.transcoders("llama", kind, activation="jointtopk", k=K)
    expected = dense_choice(chosen, list(engine.inputs))
    total = torch.zeros(len(setups.IDS), dtype=torch.long)
    for layer, features in found.layers.items():
        dense = torch.zeros_like(expected[layer])
        dense[features.position, features.index] = features.activation
        torch.testing.assert_close(dense, expected[layer])
        assert torch.equal(features.encoder[features.row], chosen[layer].W_enc[features.index])
        total += torch.bincount(features.position, minlength=len(total))
    assert total.tolist() == [K] * len(total)
    for layer in chosen.layers:
        rebuilt = chosen.decode(layer, expected)
        torch.testing.assert_close(found.output[layer] - rebuilt, found.error[layer])


def test_leading_positions_have_no_features() -> None:
    config = {"activation": "jointtopk", "k": K, "leading_positions": 2}
    _, found = setups.engine("llama", "cross-layer", **config)
    positions = torch.cat([features.position for features in found.layers.values()])
    assert positions.unique().tolist() == list(range(2, len(setups.IDS)))


def test_a_circuit_is_complete() -> None:
    chosen = setups.transcoders("llama", "cross-layer", activation="jointtopk", k=K)
    graph = attribute(setups.model("llama"), chosen, torch.tensor(setups.IDS))
    assert graph.completeness_error is not None
    assert graph.completeness_error < 1e-4
    assert len(graph.of_kind("feature")) == K * len(setups.IDS)


@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
def test_it_cannot_be_attached(mode: Any) -> None:
    chosen = setups.transcoders("llama", "cross-layer", activation="jointtopk", k=K)
    with pytest.raises(InputError, match="over all layers .*attribute.. and verify.. work"):
        attach(setups.model("llama"), chosen, mode=mode)


def test_keep_joint() -> None:
    acts = {0: torch.tensor([[1.0, 0.0, 3.0]]), 2: torch.tensor([[2.0, 5.0]])}
    norms = {0: torch.tensor([9.0, 1.0, 1.0]), 2: torch.tensor([1.0, 1.0])}
    kept = keep_joint(acts, norms, 2)
    assert kept[0].tolist() == [[1.0, 0.0, 0.0]]
    assert kept[2].tolist() == [[0.0, 5.0]]
    assert all(torch.equal(keep_joint(acts, norms, 99)[layer], acts[layer]) for layer in acts)


def test_largest_per_position() -> None:
    position = torch.tensor([0, 0, 0, 2, 2, 0])
    score = torch.tensor([1.0, 4.0, 3.0, 1.0, 2.0, 5.0])
    assert largest_per_position(position, score, 2).tolist() == [
        False,
        True,
        False,
        True,
        True,
        True,
    ]
    assert largest_per_position(position[:0], score[:0], 2).tolist() == []


@pytest.mark.parametrize("k", [None, 0, "7", 1.5])
def test_k_is_needed(k: Any) -> None:
    with pytest.raises(ConfigError, match="'jointtopk' needs"):
        make_activation("jointtopk", d_transcoder=4, k=k)
    assert make_activation("jointtopk", d_transcoder=4, k=100)(
        torch.tensor([-1.0, 2.0])
    ).tolist() == [
        0.0,
        2.0,
    ]

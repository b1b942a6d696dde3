"""One TopK over all layers: read, and compared with its forward pass spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors
from .layouts import D, F, Files, L, joint_topk

open_set = TranscoderSet.from_pretrained


def weights(files: Files) -> dict[str, Tensor]:
    return {key: tensor for tensors in files.values() for key, tensor in tensors.items()}


def reference(w: dict[str, Tensor], x: dict[int, Tensor], k: int) -> tuple[dict, dict]:
    """Position by position: rank every feature of every layer by activation times norm."""
    acts = {i: torch.relu(x[i] @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"]) for i in range(L)}
    kept = {i: torch.zeros_like(a) for i, a in acts.items()}
    for row in range(len(x[0])):
        ranked = sorted(
            (
                (float(acts[i][row, f] * w[f"W_dec_{i}"][f].norm()), i, f)
                for i in acts
                for f in range(F)
            ),
            reverse=True,
        )
        for _, i, f in ranked[:k]:
            kept[i][row, f] = acts[i][row, f]
    found = {}
    for t in range(L):
        found[t] = w[f"b_dec_{t}"].expand(len(x[t]), D)
        for s in range(t + 1):
            found[t] = found[t] + kept[s] @ w[f"W_dec_{s}"][:, t - s]
    return kept, found


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_forward_pass(k: int, tmp_path: Path) -> None:
    files = joint_topk(tmp_path)
    opened = open_set(tmp_path, k=k)
    assert opened.provenance["format"] == "joint-topk"
    config = opened.config(1)
    assert (config.activation, config.k, config.cross_layer) == ("jointtopk", k, True)
    assert (config.input_site, config.output_site) == ("R", "O")
    x = {layer: random(50 + layer, 5, D) for layer in range(L)}
    _, expected = reference(weights(files), x, k)
    found = opened.cross_layer_transcoder()(x)
    for target in range(L):
        torch.testing.assert_close(found[target], expected[target])
    assert torch.equal(opened.rows(1, [4, 2]), files["W_dec_1.safetensors"]["W_dec_1"][[4, 2]])
    again = open_set(opened.save_pretrained(tmp_path / "native"))
    assert again.config(2).activation == "jointtopk"
    torch.testing.assert_close(again.cross_layer_transcoder()(x)[2], found[2])


def test_circuit_tracers_files_are_still_circuit_tracers(tmp_path: Path) -> None:
    files = joint_topk(tmp_path)
    for name in files:
        if name.startswith("W_dec_norm"):
            (tmp_path / name).unlink()
    opened = open_set(tmp_path, input_site="R", output_site="O")
    assert opened.provenance["format"] == "circuit-tracer"
    assert open_set(tmp_path, format="joint-topk", k=3).config(0).k == 3


def test_k_and_factors_are_asked_for(tmp_path: Path) -> None:
    joint_topk(tmp_path, factors=True)
    with pytest.raises(CheckpointError, match=r"factors.safetensors \(in \(3,\)\).*not documented"):
        open_set(tmp_path, k=3)
    with pytest.raises(ConfigError, match="factors must be 'ignore'"):
        open_set(tmp_path, k=3, factors="apply")
    with pytest.raises(CheckpointError, match=r"pass k=\.\.\. \(360 for ByteDance"):
        open_set(tmp_path, factors="ignore")
    opened = open_set(tmp_path, k=3, factors="ignore")
    assert opened.provenance["ignored"] == ["factors.safetensors"]


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        ("W_dec_1", {"W_dec_1": random(1, F, L, D)}, r"shape \(20, 3, 6\), expected \(20, 2, 6\)"),
        ("W_dec_1", {"W_dec_1": random(1, D, 2, F)}, r"shape \(6, 2, 20\), expected \(20, 2, 6\)"),
        ("W_enc_1", {"b_enc_1": None}, "no tensor b_enc_1"),
        ("W_enc_1", {"gate": random(1, F)}, "gate that the config does not account for"),
        ("W_enc_1", {"W_enc_1": random(1, D, F)}, r"W_enc_1 has shape \(6, 20\), expected"),
    ],
)
def test_files_that_do_not_fit(
    file: str, tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    files = joint_topk(tmp_path)
    name = f"{file}.safetensors"
    kept = {k: v for k, v in (files[name] | tensors).items() if v is not None}
    write_tensors(tmp_path / name, kept)
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path, k=3)


def test_damage(tmp_path: Path) -> None:
    joint_topk(tmp_path)
    with pytest.raises(InputError, match="cannot be cut"):
        open_set(tmp_path, k=3, layers=[0])
    name = "W_dec_norm_0.safetensors"
    write_tensors(tmp_path / name, {"W_dec_norm_0": random(1, F).abs()})
    with pytest.raises(CheckpointError, match="W_dec_norm_0 is not the norm of W_dec_0"):
        open_set(tmp_path, k=3)[0]
    damage_weights(tmp_path / "W_enc_1.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        open_set(tmp_path, k=3)[1]
    (tmp_path / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers \[0, 2\]; a cross-layer transcoder"):
        open_set(tmp_path, k=3)

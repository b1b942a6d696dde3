"""One TopK over all layers: read, and compared with its forward pass spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors
from .layouts import D, F, Files, L, joint_topk

open_set = TranscoderSet.from_pretrained


def weights(files: Files) -> dict[str, Tensor]:
    return {key: tensor for tensors in files.values() for key, tensor in tensors.items()}


def reference(w: dict[str, Tensor], x: dict[int, Tensor], k: int) -> tuple[dict, dict]:
    """Position by position: rank every feature of every layer by activation times norm."""
    zeros = {"b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    bias = {(n, i): w.get(f"{n}_{i}", zeros[n]) for n in zeros for i in range(L)}
    acts = {i: torch.relu(x[i] @ w[f"W_enc_{i}"].T + bias["b_enc", i]) for i in range(L)}
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
        found[t] = bias["b_dec", t].expand(len(x[t]), D)
        for s in range(t + 1):
            found[t] = found[t] + kept[s] @ w[f"W_dec_{s}"][:, t - s]
    return kept, found


@pytest.mark.parametrize(("given", "k"), [(None, 2 * L), (1, 1), (1000, 1000)])
@pytest.mark.parametrize("biases", [False, True])
def test_forward_pass(given: int | None, k: int, biases: bool, tmp_path: Path) -> None:
    files = joint_topk(tmp_path, biases)
    opened = open_set(tmp_path, k=given)
    assert opened.provenance["format"] == "joint-topk"
    assert opened.provenance["ignored"] == ["factors.safetensors"]
    config = opened.config(1)
    assert (config.activation, config.k, config.cross_layer) == ("jointtopk", k, True)
    assert (config.input_site, config.output_site) == ("R", "O")
    assert config.leading_positions == 1
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
    files = joint_topk(tmp_path, biases=True)
    for name in ("W_dec_norm.safetensors", "factors.safetensors", "config.json"):
        (tmp_path / name).unlink()
    for name, tensors in files.items():
        if name.startswith("W_dec_") and "norm" not in name:
            kept = {key: t for key, t in tensors.items() if "norm" not in key}
            write_tensors(tmp_path / name, kept)
    opened = open_set(tmp_path, input_site="R", output_site="O")
    assert opened.provenance["format"] == "circuit-tracer"
    assert open_set(tmp_path, format="joint-topk", k=3).config(0).k == 3


def test_what_the_files_have_to_say(tmp_path: Path) -> None:
    joint_topk(tmp_path)
    write_tensors(tmp_path / "factors.safetensors", {"gain": torch.ones(L)})
    with pytest.raises(CheckpointError, match=r"has gain; known and already folded"):
        open_set(tmp_path)
    (tmp_path / "factors.safetensors").unlink()
    (tmp_path / "config.json").write_text('{"d_feature": 7, "k": 2}')
    with pytest.raises(CheckpointError, match=r"says d_feature 7, but W_enc_0 has 20 features"):
        open_set(tmp_path)
    (tmp_path / "config.json").write_text('{"k": "ten"}')
    with pytest.raises(CheckpointError, match=r"pass k=\.\.\. .*360 for ByteDance"):
        open_set(tmp_path)
    (tmp_path / "config.json").unlink()
    assert open_set(tmp_path, k=3).config(0).k == 3


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        ("W_dec_1", {"W_dec_1": random(1, F, L, D)}, r"shape \(20, 3, 6\), expected \(20, 2, 6\)"),
        ("W_dec_1", {"W_dec_1": random(1, D, 2, F)}, r"shape \(6, 2, 20\), expected \(20, 2, 20\)"),
        ("W_dec_1", {"W_dec_1": None}, "no tensor W_dec_1"),
        ("W_enc_1", {"gate": random(1, F)}, "gate that the config does not account for"),
        ("W_enc_1", {"W_enc_1": random(1, D, F)}, r"W_dec_1 has shape .*expected"),
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
        open_set(tmp_path)


def test_damage(tmp_path: Path) -> None:
    files = joint_topk(tmp_path)
    with pytest.raises(InputError, match="cannot be cut"):
        open_set(tmp_path, layers=[0])
    name = "W_dec_norm.safetensors"
    write_tensors(tmp_path / name, {"W_dec_norm": random(1, L, F).abs()})
    with pytest.raises(CheckpointError, match="W_dec_norm of layer 0 is not the norm of W_dec_0"):
        open_set(tmp_path)[0]
    write_tensors(tmp_path / name, files[name])
    damage_weights(tmp_path / "W_enc_1.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        open_set(tmp_path)[1]
    (tmp_path / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers \[0, 2\]; a cross-layer transcoder"):
        open_set(tmp_path)

"""clt-training's layouts, written by hand and compared with its forward pass spelled out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors
from .layouts import D, F, Files, L, clt_training

open_set = TranscoderSet.from_pretrained


def encode(x: Tensor, w: dict[str, Tensor], k: int = 5) -> Tensor:
    """TopK after a ReLU, on the normalised input."""
    z = torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"])
    values, chosen = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, chosen, values)


def decoder(ws: list[dict[str, Tensor]], mode: str, source: int, target: int) -> Tensor:
    if mode == "pairs":
        return ws[source][f"W_decs.{target - source}"]
    if mode == "source":
        return ws[source]["W_dec"]
    if mode == "concat":
        return ws[target]["W_dec"]
    return ws[target]["W_dec"][F * source : F * (source + 1)]


def reference(files: Files, mode: str, x: dict[int, Tensor], normal: bool) -> dict[int, Tensor]:
    ws = list(files.values())
    root = math.sqrt(D)
    ins = [x[i] * (root / float(w["in_norm"]) if normal else 1) for i, w in enumerate(ws)]
    acts = [encode(ins[i], w) for i, w in enumerate(ws)]
    found = {}
    for t, w in enumerate(ws):
        out = torch.zeros(len(x[t]), D)
        for s in range(t + 1):
            out = out + acts[s] @ decoder(ws, mode, s, t)
            if mode in ("pairs", "source"):
                out = out + ws[s][f"b_decs.{t - s}"]
        skip = w["W_skips.0"] if mode in ("pairs", "source") else w["W_skip"]
        out = out + ins[t] @ skip.T
        if mode in ("concat", "per-layer"):
            out = out + w["b_dec"]
        found[t] = out * (float(w["out_norm"]) / root if normal else 1)
    return found


@pytest.mark.parametrize("mode", ["pairs", "source", "concat", "per-layer"])
@pytest.mark.parametrize("normal", [True, False])
def test_cross_layer(mode: str, normal: bool, tmp_path: Path) -> None:
    files = clt_training(tmp_path, mode, normalize_io=normal)
    opened = open_set(tmp_path)
    assert opened.cross_layer
    assert opened.provenance["format"] == "clt-training"
    assert opened.provenance["folds"] == (["input and output norms"] if normal else [])
    x = {layer: random(50 + layer, 4, D) for layer in range(L)}
    found = opened.cross_layer_transcoder()(x)
    for target, expected in reference(files, mode, x, normal).items():
        torch.testing.assert_close(found[target], expected, rtol=1e-4, atol=1e-5)
    fresh = open_set(tmp_path)
    for which, full in (("encoder", opened[1].W_enc), ("decoder", opened[1].W_dec)):
        torch.testing.assert_close(fresh.rows(1, [4, 2], which), full[[4, 2]])


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_per_layer(activation: str, tmp_path: Path) -> None:
    files = clt_training(tmp_path, "single", activation=activation)
    opened = open_set(tmp_path, layers=[1])
    assert opened.layers == (1,)
    assert not opened.cross_layer
    w, x = files["layers.1.mlp/sae.safetensors"], random(5, 4, D)
    inner = x * math.sqrt(D) / float(w["in_norm"])
    acts = encode(inner, w)
    if activation == "groupmax":
        z = torch.relu(inner @ w["encoder.weight"].T + w["encoder.bias"]).unflatten(-1, (5, -1))
        acts = torch.where(z == z.max(-1, keepdim=True).values, z, 0).flatten(-2)
    expected = (acts @ w["W_dec"] + w["b_dec"] + inner @ w["W_skip"].T) * 0.7 / math.sqrt(D)
    torch.testing.assert_close(opened[1](x), expected, rtol=1e-4, atol=1e-5)


def test_scales_after_the_encoder(tmp_path: Path) -> None:
    files = clt_training(tmp_path, post_encoder_scale=True)
    name = "layers.0.mlp/sae.safetensors"
    scales = {f"post_enc_scales.{j}": random(70 + j, F) for j in range(L)}
    write_tensors(tmp_path / name, files[name] | scales)
    for j in range(L):
        files[name][f"W_decs.{j}"] = (
            files[name][f"W_decs.{j}"] * scales[f"post_enc_scales.{j}"][:, None]
        )
    x = {layer: random(50 + layer, 4, D) for layer in range(L)}
    found = open_set(tmp_path).cross_layer_transcoder()(x)
    for target, expected in reference(files, "pairs", x, True).items():
        torch.testing.assert_close(found[target], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divide_cross_layer": True}, "has divide_cross_layer, which divides"),
        ({"topk_coalesced": True}, "chooses the top k anew"),
        ({"secondary_target_tied": True}, "a second decoder"),
        ({"transcode": False}, "a sparse autoencoder"),
        ({"activation": "batchtopk"}, "chooses features over a batch"),
        ({"k": None}, "no k as a number: pass k="),
        ({"coalesce_topk": "group"}, "coalesce_topk 'group' is not known"),
        ({"n_targets": 2}, "n_targets=2, but layer 0 of 3 writes to 3 layers"),
        ({"n_targets": "all"}, "n_targets must be a number"),
        ({"d_in": 8}, "d_in=6, but cfg.json says 8"),
        ({"normalize_io": False}, None),
        ({"skip_connection": False}, "W_skips.0, W_skips.1, W_skips.2 that the config does not"),
    ],
)
def test_configs_that_are_refused(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    clt_training(tmp_path, **changes)
    if message is None:
        assert open_set(tmp_path).layers == (0, 1, 2)
        return
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_decs.1": None}, "no tensor W_decs.1"),
        ({"W_decs.3": random(1, F, D)}, "W_decs.3 that the config does not account for"),
        ({"W_decs.1": random(1, D, F)}, r"W_decs.1 has shape \(6, 20\), expected \(20, 6\)"),
        ({"in_norm": None}, "no tensor in_norm"),
        ({"W_dec": random(1, F, D)}, None),  # an alias of W_decs.0
    ],
)
def test_files_that_do_not_fit(
    tensors: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    files = clt_training(tmp_path)
    name = "layers.0.mlp/sae.safetensors"
    kept = {k: v for k, v in (files[name] | tensors).items() if v is not None}
    write_tensors(tmp_path / name, kept)
    if message is None:
        assert open_set(tmp_path).layers == (0, 1, 2)
        return
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


def test_what_has_no_place(tmp_path: Path) -> None:
    files = clt_training(tmp_path)
    name = "layers.0.mlp/sae.safetensors"
    for change, message in (
        ({"post_encs.1": random(1, F)}, "post_enc.1 is not zero; it adds a bias"),
        ({"W_skips.2": random(1, D, D)}, "W_skips.2 is not zero; it is a skip path"),
        ({"out_norm": torch.tensor([0.0])}, "out_norm.0 is 0.0, not a positive"),
    ):
        write_tensors(tmp_path / name, files[name] | change)
        with pytest.raises(CheckpointError, match=message):
            open_set(tmp_path)[0]


def test_damage(tmp_path: Path) -> None:
    clt_training(tmp_path)
    with pytest.raises(InputError, match="cannot be cut"):
        open_set(tmp_path, layers=[0])
    damage_weights(tmp_path / "layers.0.mlp/sae.safetensors")
    with pytest.raises(CheckpointError, match="NaN|not zero|not a positive"):
        open_set(tmp_path)[0]
    path = tmp_path / "layers.1.mlp/sae.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_set(tmp_path)
    path.with_name("cfg.json").write_text(json.dumps({"n_targets": 2}))
    with pytest.raises(CheckpointError, match="no 'transcode: true'"):
        open_set(tmp_path)


def test_other_folder_names(tmp_path: Path) -> None:
    clt_training(tmp_path, "single")
    for layer in range(L):
        (tmp_path / f"layers.{layer}.mlp").rename(tmp_path / f"h.{layer}.mlp")
    assert open_set(tmp_path).layers == (0, 1, 2)

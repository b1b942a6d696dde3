"""decode-clt's layout, written by hand and compared with its forward pass spelled out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors
from .layouts import D, F, L, decode_clt

open_set = TranscoderSet.from_pretrained
DECODERS = "decoder_module.decoders"


def statistics(folder: Path, layer: int, side: str, method: str) -> tuple[Tensor, Tensor]:
    if method == "none":
        return torch.zeros(D), torch.ones(D)
    if method == "sqrt_d_model":
        return torch.zeros(D), torch.full((D,), 1 / math.sqrt(D))
    entry = json.loads((folder / "norm_stats.json").read_text())[str(layer)][side]
    return torch.tensor(entry["mean"]), torch.tensor(entry["std"])


def reference(
    folder: Path, w: dict[str, Tensor], x: dict[int, Tensor], kind: str, tying: str, method: str
) -> dict[int, Tensor]:
    inner, acts = {}, {}
    for s in range(L):
        mean, std = statistics(folder, s, "inputs", method)
        inner[s] = (x[s] - mean) / std
        encoder = f"encoder_module.encoders.{s}"
        z = inner[s] @ w[f"{encoder}.weight"].T + w[f"{encoder}.bias_param"]
        theta = w["theta_manager.log_threshold"][s].exp() if kind == "jumprelu" else 0.0
        acts[s] = z * (z > theta)
    found = {}
    for t in range(L):
        out = torch.zeros(len(x[t]), D)
        if tying == "per_target":
            name = f"{DECODERS}.{t}"
            summed = torch.stack([acts[s] for s in range(t + 1)]).sum(0)
            out = summed @ w[f"{name}.weight"].T + w[f"{name}.bias_param"]
        else:
            for s in range(t + 1):
                name = f"{DECODERS}.{s}->{t}" if tying == "none" else f"{DECODERS}.{s}"
                out = out + acts[s] @ w[f"{name}.weight"].T + w[f"{name}.bias_param"]
        if f"decoder_module.skip_weights.{t}" in w:
            out = out + inner[t] @ w[f"decoder_module.skip_weights.{t}"].T
        mean, std = statistics(folder, t, "targets", method)
        found[t] = out * std + mean
    return found


@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
@pytest.mark.parametrize("method", ["none", "mean_std", "sqrt_d_model"])
def test_forward_pass(kind: str, tying: str, method: str, tmp_path: Path) -> None:
    changes = {"activation_fn": kind, "decoder_tying": tying, "normalization_method": method}
    w = decode_clt(tmp_path, **changes)["clt.safetensors"]
    if tying != "none":
        w |= {f"decoder_module.skip_weights.{t}": random(80 + t, D, D) for t in range(L)}
        write_tensors(tmp_path / "clt.safetensors", w)
        raw = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(raw | {"skip_connection": True}))
    opened = open_set(tmp_path)
    assert opened.cross_layer
    assert opened.provenance["format"] == "decode-clt"
    assert (opened.config(1).input_site, opened.config(1).output_site) == ("N0", "O'")
    x = {layer: random(50 + layer, 4, D) for layer in range(L)}
    found = opened.cross_layer_transcoder()(x)
    for target, expected in reference(tmp_path, w, x, kind, tying, method).items():
        torch.testing.assert_close(found[target], expected, rtol=1e-4, atol=1e-4)
    fresh = open_set(tmp_path)
    for which, full in (("encoder", opened[1].W_enc), ("decoder", opened[1].W_dec)):
        torch.testing.assert_close(fresh.rows(1, [4, 2], which), full[[4, 2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "topk"}, "normalised over the batch"),
        ({"activation_fn": "batchtopk"}, "normalised over the batch"),
        ({"activation_fn": "gelu"}, "activation_fn 'gelu' is not known"),
        ({"num_layers": 0}, "num_layers must be a positive number"),
        ({"num_layers": 1 << 50}, "has 3 encoders, but cfg.json says num_layers=1125"),
        ({"d_model": 1 << 50}, r"shape \(20, 6\), expected \(20, 1125"),
        ({"num_features": F + 1}, r"has shape \(20, 6\), expected \(21, 6\)"),
        ({"enable_feature_scale": True}, "enable_feature_scale, which has no place"),
        ({"skip_connection": True}, "skip paths from each layer to all later ones"),
        ({"normalization_method": "whitening"}, "normalization_method 'whitening' is not known"),
        ({"tl_input_template": None}, "does not name the input hook"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    decode_clt(tmp_path)
    raw = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


def test_normalisation_is_settled(tmp_path: Path) -> None:
    decode_clt(tmp_path)
    raw = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(raw | {"normalization_method": "none"}))
    with pytest.raises(CheckpointError, match="but there is norm_stats.json: pass normalization="):
        open_set(tmp_path)
    assert open_set(tmp_path, normalization="none").provenance["folds"] == []
    folds = open_set(tmp_path, normalization="mean_std").provenance["folds"]
    assert folds == ["normalisation mean_std"]
    with pytest.raises(ConfigError, match="normalization must be one of"):
        open_set(tmp_path, normalization="batch")
    (tmp_path / "norm_stats.json").write_text(json.dumps({"0": {"inputs": {"mean": [1]}}}))
    with pytest.raises(
        CheckpointError, match="no 6 means and deviations for the inputs of layer 0"
    ):
        open_set(tmp_path, normalization="mean_std")
    (tmp_path / "norm_stats.json").unlink()
    with pytest.raises(CheckpointError, match="norm_stats.json .* is missing"):
        open_set(tmp_path, normalization="mean_std")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{DECODERS}.0->1.weight": random(1, F, D)}, r"shape \(20, 6\), expected \(6, 20\)"),
        ({f"{DECODERS}.0->2.weight": None}, "no tensor decoder_module.decoders.0->2.weight"),
        ({f"{DECODERS}.2->1.weight": random(1, D, F)}, "2->1.weight that the config does not"),
        ({"theta_manager.log_threshold": None}, "no tensor theta_manager.log_threshold"),
    ],
)
def test_files_that_do_not_fit(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    w = decode_clt(tmp_path)["clt.safetensors"]
    kept = {k: v for k, v in (w | tensors).items() if v is not None}
    write_tensors(tmp_path / "clt.safetensors", kept)
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


def test_damage_and_choice(tmp_path: Path) -> None:
    decode_clt(tmp_path / "one")
    decode_clt(tmp_path / "two", activation_fn="relu")
    with pytest.raises(CheckpointError, match="2 folders with cfg.json .*folder=, one of one, two"):
        open_set(tmp_path)
    assert open_set(tmp_path, folder="two").config(0).activation == "relu"
    with pytest.raises(InputError, match="cannot be cut"):
        open_set(tmp_path, folder="two", layers=[0])
    damage_weights(tmp_path / "one/clt.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        open_set(tmp_path / "one")[0]
    write_tensors(tmp_path / "one/other.safetensors", {"x": random(1, 2)})
    with pytest.raises(CheckpointError, match="expected one .safetensors file beside"):
        open_set(tmp_path / "one")
    (tmp_path / "two/clt.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_set(tmp_path / "two")

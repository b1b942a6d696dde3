"""The sackfield layout, written by hand and compared with its forward pass spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors
from .layouts import D, F, sackfield

open_set = TranscoderSet.from_pretrained


def test_forward_pass(tmp_path: Path) -> None:
    files = sackfield(tmp_path)
    opened = open_set(tmp_path)
    assert opened.layers == (0, 1)
    assert opened.provenance["format"] == "sackfield"
    config = opened.config(1)
    assert (config.activation, config.skip) == ("jumprelu", True)
    assert (config.input_site, config.output_site, config.base_model) == ("N1", "O", "owner/m")
    assert config.extra["d_hidden"] == F
    x = random(5, 4, D)
    for layer in range(2):
        w = files[f"layer_{layer}.safetensors"]
        z = x @ w["W_enc"] + w["b_enc"]
        expected = (z * (z > w["threshold"])) @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T
        torch.testing.assert_close(opened[layer](x), expected)
        assert torch.equal(opened.rows(layer, [7, 2], "encoder"), w["W_enc"].T[[7, 2]])
        assert torch.equal(opened.rows(layer, [7, 2]), w["W_dec"][[7, 2]])


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"W_enc": random(1, F, D)}, {}, r"has d_in=20, but its JSON says d_model=6"),
        ({"W_dec": random(1, D, F)}, {}, r"W_dec has shape \(6, 20\), expected \(20, 6\)"),
        ({"W_gate": random(1, F)}, {}, "W_gate that the config does not account for"),
        ({"b_enc": None}, {}, "no tensor b_enc"),
        ({"threshold": None}, {}, "activation='jumprelu', but the file has no threshold"),
        ({}, {"activation": "relu"}, "activation='relu', but the file has a threshold"),
        ({}, {"activation": "topk"}, "activation='topk'"),
        ({}, {"d_hidden": 7}, "d_transcoder=20, but its JSON says d_hidden=7"),
        ({}, {"layer": 4}, "layer=0, but its JSON says layer=4"),
    ],
)
def test_what_does_not_fit(
    tensors: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    files = sackfield(tmp_path, **changes)
    name = "layer_0.safetensors"
    kept = {k: v for k, v in (files[name] | tensors).items() if v is not None}
    write_tensors(tmp_path / name, kept)
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path, layers=[0])


def test_damage(tmp_path: Path) -> None:
    sackfield(tmp_path)
    damage_weights(tmp_path / "layer_0.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        open_set(tmp_path)[0]
    data = (tmp_path / "layer_1.safetensors").read_bytes()
    (tmp_path / "layer_1.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_set(tmp_path)
    (tmp_path / "layer_0.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="should hold a JSON object"):
        open_set(tmp_path, layers=[0])

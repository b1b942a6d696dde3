"""sparsify's layout, written by hand and compared with its forward pass spelled out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors

D, F, K = 6, 20, 4
MODERN = {"transcode": True}


def tensors(seed: int, **more: Tensor) -> dict[str, Tensor]:
    return {
        "encoder.weight": random(seed, F, D),
        "encoder.bias": random(seed + 1, F),
        "W_dec": random(seed + 2, F, D),
        "b_dec": random(seed + 3, D),
        **more,
    }


def write_layer(
    folder: Path, content: dict[str, Tensor], raw: dict[str, Any] | None = MODERN
) -> Path:
    path = folder / "sae.safetensors"
    write_tensors(path, content)
    if raw is not None:
        keys = {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": False,
            "num_latents": F,
            "k": K,
            "multi_topk": False,
            "skip_connection": "W_skip" in content,
            "d_in": D,
        }
        (folder / "cfg.json").write_text(json.dumps(keys | raw))
    return path


def reference(x: Tensor, w: dict[str, Tensor], centred: bool) -> Tensor:
    inner = x - w["b_dec"] if centred else x
    z = torch.relu(inner @ w["encoder.weight"].T + w["encoder.bias"])
    kept = torch.zeros_like(z)
    for row in range(len(z)):
        for feature in z[row].argsort(descending=True)[:K].tolist():
            kept[row, feature] = z[row, feature]
    out = kept @ w["W_dec"] + w["b_dec"]
    return out + x @ w["W_skip"].T if "W_skip" in w else out


@pytest.mark.parametrize("hookpoint", ["layers.{}.mlp", "model.layers.{}.mlp", "h.{}.mlp"])
@pytest.mark.parametrize("skip", [False, True])
def test_forward(hookpoint: str, skip: bool, tmp_path: Path) -> None:
    content = {
        n: tensors(10 * n, **({"W_skip": random(99, D, D)} if skip else {})) for n in (0, 11)
    }
    for layer, w in content.items():
        write_layer(tmp_path / hookpoint.format(layer), w)
    (tmp_path / "config.json").write_text("{}")
    found = TranscoderSet.from_pretrained(tmp_path)
    assert found.layers == (0, 11)
    x = random(5, 7, D)
    for layer, w in content.items():
        torch.testing.assert_close(found[layer](x), reference(x, w, centred=False))
        assert torch.equal(found.rows(layer, [4, 2], "encoder"), w["encoder.weight"][[4, 2]])
    first = found.config(0)
    assert (first.activation, first.k, first.relu_first, first.skip) == ("topk", K, True, skip)
    assert (first.input_site, first.output_site, first.leading_positions) == ("N1", "O", 0)
    assert first.extra["expansion_factor"] == 32
    assert found.provenance["format"] == "sparsify"
    assert found.provenance["folds"] == []
    assert found.provenance["centring"]["11"] == 'cfg.json has "transcode": true'


@pytest.mark.parametrize(
    ("raw", "options", "centred", "why"),
    [
        ({"transcode": True}, {}, False, '"transcode": true'),
        ({}, {}, True, 'no "transcode"'),
        ({}, {"legacy_centering": False}, False, "legacy_centering=False was given"),
        ({"transcode": True}, {"legacy_centering": True}, True, "legacy_centering=True was given"),
        ({"transcode": False}, {"legacy_centering": True}, True, "was given"),
    ],
)
def test_centring(
    raw: dict[str, Any], options: dict[str, Any], centred: bool, why: str, tmp_path: Path
) -> None:
    w = tensors(3, W_skip=random(9, D, D))
    write_layer(tmp_path / "layers.2.mlp", w, raw)
    found = TranscoderSet.from_pretrained(tmp_path, **options)
    x = random(5, 7, D)
    torch.testing.assert_close(found[2](x), reference(x, w, centred))
    assert not torch.allclose(found[2](x), reference(x, w, not centred))
    assert why in found.provenance["centring"]["2"]
    assert bool(found.provenance["folds"]) == centred
    assert torch.equal(found.rows(2, [3], "encoder"), w["encoder.weight"][[3]])


def test_an_autoencoder(tmp_path: Path) -> None:
    write_layer(tmp_path / "layers.2.mlp", tensors(3), {"transcode": False})
    with pytest.raises(CheckpointError, match="it is an autoencoder.*legacy_centering"):
        TranscoderSet.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must be True or False, got 'yes'"):
        TranscoderSet.from_pretrained(tmp_path, legacy_centering="yes")


def test_groupmax(tmp_path: Path) -> None:
    w = tensors(3)
    write_layer(tmp_path / "layers.2.mlp", w, {**MODERN, "activation": "groupmax", "k": 5})
    found = TranscoderSet.from_pretrained(tmp_path)
    x = random(5, 7, D)
    z = torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"]).reshape(7, 5, 4)
    kept = torch.where(z == z.amax(-1, keepdim=True), z, 0.0).reshape(7, F)
    torch.testing.assert_close(found[2](x), kept @ w["W_dec"] + w["b_dec"])
    assert (found.config(2).activation, found.config(2).n_groups) == ("grouptopk", 5)
    write_layer(tmp_path / "layers.2.mlp", w, {**MODERN, "activation": "groupmax", "k": 7})
    with pytest.raises(CheckpointError, match="20 features do not make 7 groups"):
        TranscoderSet.from_pretrained(tmp_path)


def test_without_a_config(tmp_path: Path) -> None:
    w = tensors(3)
    write_layer(tmp_path / "h.2.mlp", w, None)
    with pytest.raises(CheckpointError, match=r"does not say k .*pass k=\.\.\."):
        TranscoderSet.from_pretrained(tmp_path)
    found = TranscoderSet.from_pretrained(tmp_path, k=K, legacy_centering=False)
    x = random(5, 7, D)
    torch.testing.assert_close(found[2](x), reference(x, w, centred=False))


@pytest.mark.parametrize(
    ("content", "raw", "message"),
    [
        (tensors(0), {**MODERN, "k": None}, r"does not say k .*pass k=\.\.\."),
        (tensors(0), {**MODERN, "k": "4"}, "does not say k"),
        (tensors(0), {**MODERN, "activation": "gelu"}, "activation 'gelu'; known: topk, groupmax"),
        (tensors(0), {**MODERN, "d_in": 7}, "d_in=6, but cfg.json says 7"),
        (tensors(0), {**MODERN, "num_latents": 7}, "num_latents=20, but cfg.json says 7"),
        (tensors(0), {**MODERN, "skip_connection": True}, "no W_skip, but cfg.json says"),
        (tensors(0, W_skip=random(1, D, D)), {**MODERN, "skip_connection": False}, "a W_skip, but"),
        (tensors(0, **{"encoder.weight": random(1, D, F)}), MODERN, "but cfg.json says"),
        (tensors(0, W_dec=random(1, D, F)), MODERN, r"W_dec has shape \(6, 20\)"),
        (tensors(0, threshold=random(1, F)), MODERN, "threshold that the config does not account"),
        (tensors(0, b_dec=random(1, D, 1)), MODERN, "expected encoder.weight"),
        (tensors(0, b_dec=random(1, 9), W_dec=random(1, F, 9)), {}, "cannot be subtracted"),
        (tensors(0, W_dec=torch.zeros(F, D, dtype=torch.int32)), MODERN, "dtype I32"),
    ],
)
def test_what_is_wrong(
    content: dict[str, Tensor], raw: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_layer(tmp_path / "layers.0.mlp", content, raw)
    with pytest.raises(CheckpointError, match=message):
        TranscoderSet.from_pretrained(tmp_path)


def test_k_out_of_range_and_damage(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "layers.0.mlp", tensors(0), {**MODERN, "k": 21})
    with pytest.raises(ConfigError, match="1 <= k <= 20"):
        TranscoderSet.from_pretrained(tmp_path)
    write_layer(tmp_path / "layers.0.mlp", tensors(0))
    damage_weights(path)
    with pytest.raises(CheckpointError, match="NaN"):
        TranscoderSet.from_pretrained(tmp_path)[0]
    write_layer(tmp_path / "more" / "layers.0.mlp", tensors(0))
    with pytest.raises(CheckpointError, match="two of layer 0"):
        TranscoderSet.from_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no layers.\{i\}.mlp/sae.safetensors"):
        TranscoderSet.from_pretrained(tmp_path / "empty", format="sparsify")


def test_other_layouts_in_folders_of_the_same_name(tmp_path: Path) -> None:
    content = tensors(0)
    content["W_decs.0"] = content.pop("W_dec")
    write_layer(tmp_path / "layers.0.mlp", content)
    with pytest.raises(CheckpointError) as caught:
        TranscoderSet.from_pretrained(tmp_path)
    assert "layers.0.mlp" in str(caught.value)

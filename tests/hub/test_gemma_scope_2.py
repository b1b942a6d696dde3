"""Gemma Scope 2's layouts, written by hand and compared with their forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors

D, F, N = 6, 20, 3


def tensors(seed: int, *, affine: bool = False, **more: Tensor) -> dict[str, Tensor]:
    skip = {"affine_skip_connection": random(seed + 9, D, D)} if affine else {}
    return {
        "w_enc": random(seed, D, F),
        "w_dec": random(seed + 1, F, D),
        "b_enc": random(seed + 2, F),
        "b_dec": random(seed + 3, D),
        "threshold": random(seed + 4, F).abs(),
        **skip,
        **more,
    }


def cross_tensors(layer: int, *, affine: bool = False, **more: Tensor) -> dict[str, Tensor]:
    decoder = random(50 + layer, F, N, D)
    decoder[:, :layer] = 0
    return tensors(10 * layer, affine=affine, w_dec=decoder, **more)


def config(layer: int, **more: Any) -> dict[str, Any]:
    return {
        "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
        "width": F,
        "l0": 20,
        "model_name": "google/gemma-3-4b-it",
        "architecture": "jump_relu",
        "affine_connection": False,
        "type": "transcoder",
        **more,
    }


def write_layer(
    folder: Path, name: str, content: dict[str, Tensor], raw: dict[str, Any] | None = None
) -> Path:
    path = folder / name / "params.safetensors"
    write_tensors(path, content)
    if raw is not None:
        (path.parent / "config.json").write_text(json.dumps(raw))
    return path


def write_clt(folder: Path, *, affine: bool = False) -> dict[int, dict[str, Tensor]]:
    content = {layer: cross_tensors(layer, affine=affine) for layer in range(N)}
    for layer, one in content.items():
        write_tensors(folder / f"params_layer_{layer}.safetensors", one)
    return content


def jumprelu(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    z = x @ w["w_enc"] + w["b_enc"]
    return z * (z > w["threshold"])


@pytest.mark.parametrize("affine", [False, True])
def test_per_layer(affine: bool, tmp_path: Path) -> None:
    ending = "_affine" if affine else ""
    content = {layer: tensors(10 * layer, affine=affine) for layer in (0, 4)}
    for layer, w in content.items():
        name = f"transcoder_all/layer_{layer}_width_16k_l0_small{ending}"
        write_layer(tmp_path, name, w, config(layer))
        # Autoencoders of the same repository.
        write_layer(tmp_path, f"mlp_out_all/layer_{layer}_width_16k_l0_small", tensors(1))
    found = TranscoderSet.from_pretrained(tmp_path)
    assert found.layers == (0, 4)
    x = random(5, 7, D)
    for layer, w in content.items():
        expected = jumprelu(x, w) @ w["w_dec"] + w["b_dec"]
        if affine:
            expected = expected + x @ w["affine_skip_connection"]
        torch.testing.assert_close(found[layer](x), expected)
        assert torch.equal(found.rows(layer, [4, 2], "encoder"), w["w_enc"].T[[4, 2]])
    first = found.config(4)
    assert (first.input_site, first.output_site, first.skip) == ("N1", "O'", affine)
    assert (first.leading_positions, first.base_model) == (4, "google/gemma-3-4b-it")
    assert found.provenance["variant"] == f"transcoder_all: width_16k_l0_small{ending}"
    assert found.provenance["config"]["4"]["l0"] == 20
    assert found.provenance["assumed"] == []


@pytest.mark.parametrize(
    ("name", "model", "leading"),
    [
        ("gemma-scope-2-270m-pt", "google/gemma-3-270m", 1),
        ("gemma-scope-2-270m-it", "google/gemma-3-270m-it", 4),
        ("gemma-scope-2-1b-pt", "google/gemma-3-1b-pt", 1),
        ("other", None, 1),
    ],
)
def test_without_a_config(name: str, model: str | None, leading: int, tmp_path: Path) -> None:
    write_layer(tmp_path / name, "transcoder/layer_2_width_16k_l0_big", tensors(0))
    found = TranscoderSet.from_pretrained(tmp_path / name)
    first = found.config(2)
    assert (first.input_site, first.output_site) == ("N1", "O'")
    assert (first.base_model, first.leading_positions) == (model, leading)
    assert found.provenance["assumed"] == ([f"base model {model}, from the name"] if model else [])
    given = TranscoderSet.from_pretrained(tmp_path / name, base_model="a/b-it", input_site="R")
    assert (given.config(2).leading_positions, given.config(2).input_site) == (4, "R")
    given = TranscoderSet.from_pretrained(tmp_path / name, leading_positions=0)
    assert given.config(2).leading_positions == 0


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_cross_layer(affine: bool, inside: bool, tmp_path: Path) -> None:
    folder = tmp_path / "clt" / f"width_262k_l0_big{'_affine' if affine else ''}"
    content = write_clt(folder, affine=affine)
    found = TranscoderSet.from_pretrained(folder if inside else tmp_path)
    assert found.cross_layer
    assert found.layers == (0, 1, 2)
    x = {layer: random(70 + layer, 4, D) for layer in range(N)}
    hidden = {layer: jumprelu(x[layer], content[layer]) for layer in range(N)}
    outputs = found.cross_layer_transcoder()(x)
    for target in range(N):
        expected = content[target]["b_dec"].expand(4, D)
        for source in range(N):
            expected = expected + hidden[source] @ content[source]["w_dec"][:, target]
        if affine:
            expected = expected + x[target] @ content[target]["affine_skip_connection"]
        torch.testing.assert_close(outputs[target], expected)
    rows = found.rows(1, [4, 2])
    assert torch.equal(rows, content[1]["w_dec"][[4, 2], 1:])
    assert found.targets(1) == (1, 2)


def test_cross_layer_that_writes_backwards(tmp_path: Path) -> None:
    folder = tmp_path / "clt" / "width_262k_l0_medium"
    write_clt(folder)
    bad = cross_tensors(2)
    bad["w_dec"][3, 1, 2] = 1e-3
    write_tensors(folder / "params_layer_2.safetensors", bad)
    found = TranscoderSet.from_pretrained(tmp_path)
    found[1]
    with pytest.raises(CheckpointError, match=r"writes to layers before its own \(slices 0 to 1"):
        found[2]
    with pytest.raises(InputError, match="cross-layer set and cannot be cut"):
        TranscoderSet.from_pretrained(tmp_path, layers=[0])
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers \[0, 2\]; .* all of them from 0 on"):
        TranscoderSet.from_pretrained(tmp_path)


def test_the_choice_of_a_set(tmp_path: Path) -> None:
    for name in ("width_16k_l0_small", "width_16k_l0_big", "width_262k_l0_small"):
        for layer in (0, 1):
            write_layer(tmp_path, f"transcoder_all/layer_{layer}_{name}", tensors(0))
    affine = tensors(0, affine=True)
    write_layer(tmp_path, "transcoder_all/layer_0_width_16k_l0_small_affine", affine)
    write_layer(tmp_path, "transcoder/layer_1_width_16k_l0_medium", tensors(0))
    write_clt(tmp_path / "clt" / "width_262k_l0_big")

    def chosen(**options: Any) -> str:
        return TranscoderSet.from_pretrained(tmp_path, **options).provenance["variant"]

    assert chosen() == "transcoder_all: width_16k_l0_small"
    assert chosen(l0="big") == "transcoder_all: width_16k_l0_big"
    assert chosen(width="262k") == "transcoder_all: width_262k_l0_small"
    assert chosen(affine=True) == "transcoder_all: width_16k_l0_small_affine"
    assert chosen(folder="transcoder") == "transcoder: width_16k_l0_medium"
    assert chosen(folder="clt") == "clt: width_262k_l0_big"
    inside = TranscoderSet.from_pretrained(tmp_path / "transcoder_all", width="262k")
    assert inside.layers == (0, 1)
    with pytest.raises(CheckpointError, match="with width='5k'; it has .*clt: width_262k_l0_big"):
        chosen(width="5k")
    with pytest.raises(CheckpointError, match="with l0=17"):
        chosen(l0=17)


@pytest.mark.parametrize(
    ("content", "raw", "message"),
    [
        (tensors(0, w_enc=random(1, F, D)), None, "w_dec has shape"),
        (tensors(0, w_enc=random(1, F, D), w_dec=random(1, D, F)), None, "has shape"),
        (tensors(0, w_dec=random(1, F)), None, r"w_dec \(F, d\)"),
        (tensors(0, affine=True), None, "an affine_skip_connection, against the folder's name"),
        (tensors(0, extra=random(1, D)), None, "extra that the config does not account for"),
        ({k: t for k, t in tensors(0).items() if k != "threshold"}, None, "no tensor threshold"),
        (tensors(0), config(0, type="sae"), "it is an autoencoder"),
        (tensors(0), config(0, hf_hook_point_out=config(0)["hf_hook_point_in"]), "autoencoder"),
        (tensors(0), config(0, architecture="topk"), "architecture 'topk'"),
        (tensors(0), config(0, hf_hook_point_in="model.layers.0.output"), "names the hook"),
    ],
)
def test_what_is_wrong(
    content: dict[str, Tensor], raw: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    write_layer(tmp_path, "transcoder_all/layer_0_width_16k_l0_small", content, raw)
    with pytest.raises(CheckpointError, match=message):
        TranscoderSet.from_pretrained(tmp_path)


def test_damage(tmp_path: Path) -> None:
    path = write_layer(tmp_path, "transcoder_all/layer_0_width_16k_l0_small", tensors(0))
    damage_weights(path)
    with pytest.raises(CheckpointError, match="NaN"):
        TranscoderSet.from_pretrained(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        TranscoderSet.from_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no Gemma Scope 2 transcoders; it has no files"):
        TranscoderSet.from_pretrained(tmp_path / "empty", format="gemma-scope-2")

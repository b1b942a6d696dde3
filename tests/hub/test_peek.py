"""The "Peek" layout, written by hand and compared with its forward pass spelled out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors

D, F = 6, 20
FOLDER = "gpt2-small-dun-chl-mlp-tc{}"


def write_layer(
    folder: Path, seed: int = 0, info: dict[str, Any] | None = None, **config: Any
) -> dict[str, Tensor]:
    tensors = {
        "W_enc": random(seed, D, F),
        "b_enc": random(seed + 1, F),
        "W_dec": random(seed + 2, F, D),
        "b_dec": random(seed + 3, D),
    }
    write_tensors(folder / "sae.safetensors", tensors)
    keys = {
        "d_in": D,
        "num_features": F,
        "d_out": D,
        "dtype": "torch.float16",
        "act_fn": "relu",
        "top_k": None,
        "tensors_filename": "sae.safetensors",
    }
    (folder / "sae.json").write_text(json.dumps(keys | config))
    if info is not None:
        (folder / "sae_info.json").write_text(json.dumps(info))
    return tensors


def place(layer: int, sublayer: str, parallel: bool = False) -> dict[str, Any]:
    return {"layer": layer, "sublayer": sublayer, "parallel_attn_mlp": parallel}


def test_relu(tmp_path: Path) -> None:
    weights = {layer: write_layer(tmp_path / FOLDER.format(layer), layer) for layer in (0, 2, 10)}
    opened = TranscoderSet.from_pretrained(tmp_path)
    assert opened.layers == (0, 2, 10)
    x = random(77, 3, D)
    for layer, w in weights.items():
        expected = torch.relu(x @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
        torch.testing.assert_close(opened[layer](x), expected)
        assert torch.equal(opened.rows(layer, [5, 3, 4], "encoder"), w["W_enc"].T[[5, 3, 4]])
        assert torch.equal(opened.rows(layer, [5, 3], "decoder"), w["W_dec"][[5, 3]])
    config = opened.config(2)
    assert (config.input_site, config.output_site, config.leading_positions) == ("N0", "O", 0)
    assert config.dtype == "float32"  # the header's, not the one that sae.json declares
    assert opened.provenance["files"][0] == "gpt2-small-dun-chl-mlp-tc0/sae.safetensors"
    assert opened.provenance["config"]["2"]["act_fn"] == "relu"


def test_topk_has_no_relu(tmp_path: Path) -> None:
    w = write_layer(tmp_path / "tc1", act_fn="top_k", top_k=17, colour="red")
    opened = TranscoderSet.from_pretrained(tmp_path)
    x = random(77, 3, D)
    z = x @ w["W_enc"] + w["b_enc"]
    kept = torch.where(z >= z.sort(dim=-1, descending=True).values[:, 16:17], z, 0)
    assert (kept < 0).any()
    torch.testing.assert_close(opened[1](x), kept @ w["W_dec"] + w["b_dec"])
    assert opened.config(1).extra == {"colour": "red"}


@pytest.mark.parametrize(
    ("config", "info", "sites"),
    [
        ({}, None, ("N0", "O")),
        ({}, {"input_layer": place(3, "mlp_in"), "output_layer": place(3, "mlp_out")}, ("N0", "O")),
        ({}, {"input_layer": place(3, "mlp_in", True)}, ("N1", "O")),
        ({}, {"input_layer": place(3, "mid"), "output_layer": None}, ("R", "O")),
        ({"hook_point": "blocks.3.mlp.hook_in"}, {"input_layer": place(3, "mid")}, ("N1", "O")),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, None, ("N0", "O")),
    ],
)
def test_sites(
    config: dict[str, Any], info: dict[str, Any] | None, sites: tuple[str, str], tmp_path: Path
) -> None:
    write_layer(tmp_path / "tc3", info=info, **config)
    opened = TranscoderSet.from_pretrained(tmp_path)
    assert (opened.config(3).input_site, opened.config(3).output_site) == sites
    if info:
        assert opened.config(3).extra["sae_info"] == info
    given = TranscoderSet.from_pretrained(
        tmp_path, input_site="R", output_site="O'", base_model="m"
    )
    assert (given.config(3).input_site, given.config(3).output_site) == ("R", "O'")
    assert given.config(3).base_model == "m"


def test_sites_that_are_none(tmp_path: Path) -> None:
    write_layer(tmp_path / "tc3", info={"input_layer": place(3, "attn_in")})
    with pytest.raises(CheckpointError, match="reads from 'attn_in', which is no input"):
        TranscoderSet.from_pretrained(tmp_path)
    write_layer(tmp_path / "tc3", info={"output_layer": place(3, "post")})
    with pytest.raises(CheckpointError, match="writes to 'post'; pass output_site="):
        TranscoderSet.from_pretrained(tmp_path)
    write_layer(tmp_path / "tc3", info={}, hook_point="blocks.3.hook_resid_pre")
    with pytest.raises(CheckpointError, match="names the hook 'blocks.3.hook_resid_pre'"):
        TranscoderSet.from_pretrained(tmp_path)


def test_layer_numbers(tmp_path: Path) -> None:
    write_layer(tmp_path, info={"input_layer": place(5, "mlp_in")})
    # A folder that is one layer: its own name is not part of the checkpoint.
    assert TranscoderSet.from_pretrained(tmp_path).layers == (5,)
    (tmp_path / "sae_info.json").unlink()
    with pytest.raises(CheckpointError, match="does not end in a layer number"):
        TranscoderSet.from_pretrained(tmp_path)
    write_layer(tmp_path / "two" / "a-tc1")
    write_layer(tmp_path / "two" / "b-tc1")
    with pytest.raises(CheckpointError, match="two folders for layer 1: a-tc1 and b-tc1"):
        TranscoderSet.from_pretrained(tmp_path / "two")


def test_layers_and_laziness(tmp_path: Path) -> None:
    for layer in (0, 1, 2):
        write_layer(tmp_path / f"tc{layer}")
    damage_weights(tmp_path / "tc1" / "sae.safetensors")
    (tmp_path / "tc2" / "sae.json").write_text("{")
    opened = TranscoderSet.from_pretrained(tmp_path, layers=[0, 1])
    assert opened.config(1).d_transcoder == F
    with pytest.raises(CheckpointError, match="NaN"):
        opened[1]
    with pytest.raises(CheckpointError, match="tc2/sae.json .* not valid JSON"):
        TranscoderSet.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not \[9\]"):
        TranscoderSet.from_pretrained(tmp_path, layers=[9])
    with pytest.raises(ConfigError, match="'peek' has no option k; its options: input_site"):
        TranscoderSet.from_pretrained(tmp_path, layers=[0], k=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "id"}, "act_fn 'id'; known: relu, top_k"),
        ({"act_fn": "top_k"}, "top_k without its number"),
        ({"num_features": 21}, "num_features=20, but sae.json says 21"),
        ({"tensors_filename": "../../other.safetensors"}, "outside of itself"),
        ({"tensors_filename": "/other.safetensors"}, "outside of itself"),
        ({"tensors_filename": "gone.safetensors"}, "no file tc0/gone.safetensors"),
    ],
)
def test_config_that_is_wrong(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_layer(tmp_path / "tc0", **config)
    with pytest.raises(CheckpointError, match=message):
        TranscoderSet.from_pretrained(tmp_path)


def test_tensors_that_are_wrong(tmp_path: Path) -> None:
    good = write_layer(tmp_path / "tc0")
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"W_enc": good["W_enc"].T, "W_dec": good["W_dec"].T}, "d_in=20, but sae.json says 6"),
        ({"b_enc": random(1, F + 1)}, r"b_enc has shape \(21,\), expected \(20,\)"),
        ({"W_enc": random(1, F)}, r"expected W_enc, .* it has .*W_enc \(20,\)"),
        ({"W_skip": random(1, D, D)}, "W_skip that the config does not account"),
    ]
    for change, message in cases:
        write_tensors(tmp_path / "tc0" / "sae.safetensors", {**good, **change})
        with pytest.raises(CheckpointError, match=message):
            TranscoderSet.from_pretrained(tmp_path)

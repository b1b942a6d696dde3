"""SAELens' layout, written by hand, compared with its forward pass, and written by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.saelens import save_saelens
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, make_set, random, write_tensors

D, F, OUT = 6, 20, 5
KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def tensors(seed: int, kind: str = "transcoder", d_out: int = OUT) -> dict[str, Tensor]:
    found = {
        "W_enc": random(seed, D, F),
        "b_enc": random(seed + 1, F),
        "W_dec": random(seed + 2, F, d_out),
        "b_dec": random(seed + 3, d_out),
    }
    if "jumprelu" in kind:
        found["threshold"] = random(seed + 4, F).abs()
    if "skip" in kind:
        found["W_skip"] = random(seed + 5, d_out, D)
    return found


def write_layer(
    folder: Path, layer: int, content: dict[str, Tensor], kind: str = "transcoder", **raw: Any
) -> Path:
    write_tensors(folder / "sae_weights.safetensors", content)
    metadata = {
        "sae_lens_version": "6.0.0",
        "model_name": "gpt2",
        "hook_name": f"blocks.{layer}.ln2.hook_normalized",
        "hook_name_out": f"blocks.{layer}.hook_mlp_out",
    }
    keys = {
        "architecture": kind,
        "d_in": D,
        "d_sae": F,
        "d_out": content["W_dec"].shape[-1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    (folder / "cfg.json").write_text(json.dumps(keys | raw))
    return folder / "sae_weights.safetensors"


def reference(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    z = x @ w["W_enc"] + w["b_enc"]
    hidden = torch.relu(z) * (z > w["threshold"]) if "threshold" in w else torch.relu(z)
    out = hidden @ w["W_dec"] + w["b_dec"]
    return out + x @ w["W_skip"].T if "W_skip" in w else out


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind: str, tmp_path: Path) -> None:
    content = {layer: tensors(10 * layer, kind) for layer in (0, 7)}
    for layer, w in content.items():
        write_layer(tmp_path / f"any_name_{layer}", layer, w, kind)
    found = TranscoderSet.from_pretrained(tmp_path)
    assert found.layers == (0, 7)
    x = random(5, 9, D)
    for layer, w in content.items():
        torch.testing.assert_close(found[layer](x), reference(x, w))
        assert torch.equal(found.rows(layer, [4, 2], "encoder"), w["W_enc"].T[[4, 2]])
        assert torch.equal(found.rows(layer, [4, 2]), w["W_dec"][[4, 2]])
    first = found.config(7)
    assert (first.input_site, first.output_site, first.base_model) == ("N0", "O'", "gpt2")
    assert first.skip == ("skip" in kind)
    assert found.provenance["format"] == "saelens"
    assert found.provenance["config"]["7"]["architecture"] == kind
    one = TranscoderSet.from_pretrained(tmp_path / "any_name_7")
    assert one.layers == (7,)


@pytest.mark.parametrize(
    ("metadata", "sites"),
    [
        ({"hook_name": "blocks.3.hook_resid_mid", "hook_name_out": "blocks.3.mlp.hook_out"}, "R O"),
        (
            {
                "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
                "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm.output",
            },
            "N1 O'",
        ),
        (
            {
                "hf_hook_name": "language_model.model.layers.3.mlp.input",
                "hf_hook_name_out": "language_model.model.layers.3.mlp",
            },
            "N1 O",
        ),
    ],
)
def test_hooks(metadata: dict[str, Any], sites: str, tmp_path: Path) -> None:
    write_layer(tmp_path / "a", 3, tensors(0), metadata=metadata)
    first = TranscoderSet.from_pretrained(tmp_path).config(3)
    assert [first.input_site, first.output_site] == sites.split()
    # Older versions kept them beside the other keys.
    write_layer(tmp_path / "a", 3, tensors(0), metadata=None, **metadata)
    first = TranscoderSet.from_pretrained(tmp_path).config(3)
    assert [first.input_site, first.output_site] == sites.split()
    given = TranscoderSet.from_pretrained(tmp_path, input_site="N0", base_model="m")
    assert (given.config(3).input_site, given.config(3).base_model) == ("N0", "m")


def test_b_dec_applied_to_the_input_is_folded(tmp_path: Path) -> None:
    w = tensors(0, d_out=D)
    write_layer(tmp_path / "a", 0, w, apply_b_dec_to_input=True)
    found = TranscoderSet.from_pretrained(tmp_path)
    x = random(5, 9, D)
    shifted = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(found[0](x), shifted)
    assert "input centring" in found.provenance["folds"][0]
    write_layer(tmp_path / "a", 0, tensors(0), apply_b_dec_to_input=True)
    with pytest.raises(CheckpointError, match="reads 6 values and writes 5"):
        TranscoderSet.from_pretrained(tmp_path)


TWO = {
    "hook_name": "blocks.0.ln2.hook_normalized",
    "hf_hook_name": "model.layers.0.pre_feedforward_layernorm.output",
    "hook_name_out": "blocks.0.hook_mlp_out",
}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"architecture": "standard"}, "'standard': an autoencoder"),
        ({"architecture": "jumprelu"}, "an autoencoder"),
        ({"architecture": None}, "'None'"),
        ({"architecture": ["transcoder"]}, "an autoencoder or something else"),
        ({"normalize_activations": "layer_norm"}, "normalises its input"),
        ({"reshape_activations": "hook_z"}, "reshapes its input"),
        ({"apply_b_dec_to_input": "no"}, "expected true or false"),
        ({"metadata": {}}, "does not name the layer"),
        ({"metadata": 5}, "metadata is no mapping"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "names the hook"),
        ({"metadata": {"hook_name": "blocks.0.mlp.hook_in"}}, "does not name the output hook"),
        ({"metadata": {**TWO, "hook_name_out": "blocks.4.hook_mlp_out"}}, "names two inputs"),
        (
            {"metadata": {**TWO, "hf_hook_name": "", "hook_name_out": "blocks.4.hook_mlp_out"}},
            "reads at layer 0 and writes at layer 4",
        ),
        ({"metadata": {**TWO, "hf_hook_name": "", "leading_positions": "x"}}, "a number"),
        ({"d_in": 9}, "d_in=6, but cfg.json says 9"),
        ({"d_sae": F + 1}, "d_sae=20, but cfg.json says 21"),
        ({"architecture": "jumprelu_transcoder"}, "no tensor threshold"),
        ({"architecture": "skip_transcoder"}, "no tensor W_skip"),
    ],
)
def test_configs_that_are_wrong(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_layer(tmp_path / "a", 0, tensors(0), **raw)
    with pytest.raises(CheckpointError, match=message):
        TranscoderSet.from_pretrained(tmp_path)


def test_tensors_that_are_wrong(tmp_path: Path) -> None:
    good = tensors(0)
    for change, message in (
        ({"W_enc": good["W_enc"].T}, "d_in=20, but"),
        ({"W_dec": random(1, OUT, F)}, "d_out=20|W_dec has shape|b_dec has shape"),
        ({"b_enc": random(1, F, 1)}, "b_enc has shape"),
        ({"threshold": random(1, F)}, "threshold that the config does not account for"),
        ({"W_dec": random(1, F)}, "expected W_enc"),
    ):
        write_layer(tmp_path / "a", 0, {**good, **change})
        with pytest.raises(CheckpointError, match=message):
            TranscoderSet.from_pretrained(tmp_path)
    damage_weights(write_layer(tmp_path / "a", 0, good))
    with pytest.raises(CheckpointError, match="NaN"):
        TranscoderSet.from_pretrained(tmp_path)[0]
    write_layer(tmp_path / "a", 0, good)
    write_layer(tmp_path / "b", 0, good)
    with pytest.raises(CheckpointError, match="two transcoders for layer 0: a and b"):
        TranscoderSet.from_pretrained(tmp_path)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("skip", [False, True])
def test_round_trip(activation: str, skip: bool, tmp_path: Path) -> None:
    made = make_set(
        activation=activation,
        skip=skip,
        input_site="N1",
        output_site="O",
        base_model="owner/model",
        leading_positions=2,
    )
    assert save_saelens(made, tmp_path / "out") == tmp_path / "out"
    found = TranscoderSet.from_pretrained(tmp_path / "out")
    x = random(5, 9, D)
    for layer in made.layers:
        torch.testing.assert_close(found[layer](x), made[layer](x))
    was, now = made.config(1), found.config(1)
    for name in ("input_site", "output_site", "base_model", "leading_positions", "skip"):
        assert getattr(now, name) == getattr(was, name)
    raw = json.loads((tmp_path / "out" / "layer_1" / "cfg.json").read_text())
    assert raw["architecture"] == KINDS[2 * (activation != "relu") + skip]
    assert raw["metadata"]["sae_lens_version"] == "6.0.0"  # else SAELens drops the metadata
    assert raw["metadata"]["hook_name"] == "blocks.1.mlp.hook_in"
    stored = load_file(tmp_path / "out" / "layer_1" / "sae_weights.safetensors")
    assert stored["W_enc"].shape == (D, 24)
    assert ("threshold" in stored) == (activation != "relu")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 0 has topk"):
        save_saelens(make_set(activation="topk", k=3), tmp_path / "out")
    with pytest.raises(ConfigError, match="no cross-layer"):
        save_saelens(make_set(cross_layer=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()

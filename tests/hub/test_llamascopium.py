"""llamascopium's layouts, written by hand and compared with its forward pass spelled out."""

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

from .checkpoints import damage_weights, folder_bytes, random, write_tensors
from .hub_server import HubServer
from .layouts import D, F, L, llamascopium, llamascopium_clt

open_set = TranscoderSet.from_pretrained
LOG = "activation_function.log_jumprelu_threshold"


def average(w: dict[str, Tensor], hook: str) -> float:
    return float(w[f"dataset_average_activation_norm.{hook}"])


def gate(z: Tensor, norms: Tensor, kind: str, theta: Tensor | None, k: int = 4) -> Tensor:
    """llamascopium's activation: on ``z`` times the decoder's norm, then divided by it again."""
    scaled = z * norms
    if kind == "topk":
        scaled = torch.relu(scaled)
        values, chosen = scaled.topk(k, dim=-1)
        acts = torch.zeros_like(scaled).scatter(-1, chosen, values)
    elif kind == "jumprelu":
        assert theta is not None
        acts = scaled * (scaled > theta)
    else:
        acts = torch.relu(scaled)
    return acts / norms


def reference(x: Tensor, w: dict[str, Tensor], layer: int, kind: str, by_norm: bool) -> Tensor:
    """Inputs and outputs scaled to norm ``sqrt(d)``, as in training."""
    s_in = math.sqrt(D) / average(w, f"blocks.{layer}.ln2.hook_normalized")
    s_out = math.sqrt(D) / average(w, f"blocks.{layer}.hook_mlp_out")
    norms = w["W_D"].norm(dim=1) if by_norm else torch.ones(F)
    theta = w[LOG].exp() if kind == "jumprelu" else None
    acts = gate((x * s_in) @ w["W_E"] + w["b_E"], norms, kind, theta)
    return (acts @ w["W_D"] + w["b_D"]) / s_out


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "topk"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_forward_pass(kind: str, by_norm: bool, tmp_path: Path) -> None:
    files = llamascopium(tmp_path, act_fn=kind, sparsity_include_decoder_norm=by_norm)
    opened = open_set(tmp_path)
    assert opened.provenance["format"] == "llamascopium"
    assert "dataset average norms" in opened.provenance["folds"]
    assert (opened.config(1).input_site, opened.config(1).output_site) == ("N0", "O'")
    assert opened.config(1).base_model == "owner/m"
    x = random(5, 7, D)
    for layer, w in enumerate(files.values()):
        expected = reference(x, w, layer, kind, by_norm)
        torch.testing.assert_close(opened[layer](x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(opened.rows(layer, [9, 3, 9]), opened[layer].W_dec[[9, 3, 9]])
        fresh = open_set(tmp_path)
        torch.testing.assert_close(fresh.rows(layer, [9, 3]), opened[layer].W_dec[[9, 3]])
        torch.testing.assert_close(
            fresh.rows(layer, [9, 3], "encoder"), opened[layer].W_enc[[9, 3]]
        )
        assert fresh.rows(layer, []).shape == (0, D)


def test_scales_that_are_folded_already(tmp_path: Path) -> None:
    files = llamascopium(tmp_path, norm_activation="inference")
    x, w = random(5, 7, D), next(iter(files.values()))
    acts = gate(x @ w["W_E"] + w["b_E"], w["W_D"].norm(dim=1), "jumprelu", w[LOG].exp())
    torch.testing.assert_close(open_set(tmp_path)[0](x), acts @ w["W_D"] + w["b_D"])


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_features_that_write_nothing(kind: str, tmp_path: Path) -> None:
    files = llamascopium(tmp_path, act_fn=kind)
    name = sorted(files)[0]
    w = files[name]
    w["W_D"][5] = 0
    write_tensors(tmp_path / name, w)
    module = open_set(tmp_path)[0]
    assert all(torch.isfinite(weight).all() for weight in module.parameters())
    x = random(5, 7, D)
    w["W_D"][5] = 1e-9  # the reference divides by the norm
    torch.testing.assert_close(module(x), reference(x, w, 0, kind, True), rtol=1e-4, atol=1e-5)


def test_the_folder_is_chosen(tmp_path: Path) -> None:
    llamascopium(tmp_path, "transcoder/8x/k4")
    other = llamascopium(tmp_path, "transcoder/8x/k16", act_fn="relu")
    llamascopium(tmp_path, "lorsa/8x/k4", sae_type="lorsa")
    with pytest.raises(CheckpointError, match="several sets; .*folder=.*transcoder/8x/k16"):
        open_set(tmp_path)
    opened = open_set(tmp_path, folder="transcoder/8x/k16", layers=[1])
    assert opened.config(1).activation == "relu"
    assert opened.provenance["files"] == [sorted(other)[1]]
    with pytest.raises(CheckpointError, match="'lorsa' checkpoint .it replaces attention"):
        open_set(tmp_path, folder="lorsa/8x/k4")
    with pytest.raises(CheckpointError, match="no set in folder 'transcoder/9x'"):
        open_set(tmp_path, folder="transcoder/9x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_glu_encoder": True}, "gated linear unit"),
        ({"sae_type": "gated"}, "sae_type 'gated' is not known"),
        ({"norm_activation": "token-wise"}, "scales every input by itself"),
        ({"act_fn": "batchtopk"}, "chooses features over a batch"),
        ({"act_fn": "topk", "top_k": None}, "no top_k as a number: pass k="),
        ({"hook_point_out": "blocks.0.ln2.hook_normalized"}, "sparse autoencoder"),
        ({"hook_point_in": "blocks.0.hook_resid_pre"}, "'blocks.0.hook_resid_pre'; known"),
        ({"hook_point_in": "ln2"}, "does not name a layer"),
        ({"d_model": 8}, "d_model=6, but config.json says 8"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    llamascopium(tmp_path, **changes)
    for name in ("transcoder/8x/k4/layer1_8x_k4",):
        for path in (tmp_path / name).iterdir():
            path.unlink()
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_D": random(1, D, F)}, r"W_D has shape \(6, 20\), expected \(20, 6\)"),
        ({"b_E": None}, "no tensor b_E"),
        ({"W_E_glu": random(1, D, F)}, "W_E_glu that the config does not account for"),
        ({LOG: None}, "no tensor activation_function.log_jumprelu_threshold"),
        ({"dataset_average_activation_norm.blocks.0.hook_mlp_out": None}, "no tensor dataset_av"),
        ({"b_E": random(1, F).int()}, "dtype I32, expected one of"),
    ],
)
def test_files_that_do_not_fit(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = llamascopium(tmp_path)
    name = sorted(files)[0]
    kept = {k: v for k, v in (files[name] | tensors).items() if v is not None}
    write_tensors(tmp_path / name, kept)
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path, layers=[0])
    assert open_set(tmp_path, layers=[1]).layers == (1,)


def test_damage(tmp_path: Path) -> None:
    files = llamascopium(tmp_path)
    first, second = sorted(files)
    damage_weights(tmp_path / first)
    with pytest.raises(CheckpointError, match="NaN|not a positive number"):
        open_set(tmp_path)[0]
    (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:300])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_set(tmp_path)


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "topk"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_cross_layer(kind: str, by_norm: bool, tmp_path: Path) -> None:
    files = llamascopium_clt(tmp_path, act_fn=kind, sparsity_include_decoder_norm=by_norm)
    w = files["sae_weights.safetensors"]
    opened = open_set(tmp_path)
    assert opened.cross_layer
    assert (opened.config(1).input_site, opened.config(1).output_site) == ("N0", "O'")
    x = {layer: random(50 + layer, 4, D) for layer in range(L)}
    acts = {}
    for layer in range(L):
        s_in = math.sqrt(D) / average(w, f"blocks.{layer}.ln2.hook_normalized")
        squares = [w[f"W_D.{t}"][layer].square().sum(1) for t in range(layer, L)]
        norms = torch.stack(squares).sum(0).sqrt() if by_norm else torch.ones(F)
        theta = w[LOG].exp()[layer] if kind == "jumprelu" else None
        acts[layer] = gate(
            (x[layer] * s_in) @ w["W_E"][layer] + w["b_E"][layer], norms, kind, theta
        )
    found = opened.cross_layer_transcoder()(x)
    for target in range(L):
        s_out = math.sqrt(D) / average(w, f"blocks.{target}.hook_mlp_out")
        expected = w[f"b_D.{target}"].expand(4, D)
        for source in range(target + 1):
            expected = expected + acts[source] @ w[f"W_D.{target}"][source]
        torch.testing.assert_close(found[target], expected / s_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(open_set(tmp_path).rows(1, [4, 2]), opened[1].W_dec[[4, 2]])


def test_cross_layer_refusals(tmp_path: Path) -> None:
    files = llamascopium_clt(tmp_path)
    w = files["sae_weights.safetensors"]
    with pytest.raises(InputError, match="cannot be cut"):
        open_set(tmp_path, layers=[0])
    # Grouped by source instead of by target.
    swapped = {f"W_D.{t}": random(t, L - t, F, D) for t in range(L)}
    write_tensors(tmp_path / "sae_weights.safetensors", w | swapped)
    with pytest.raises(CheckpointError, match=r"W_D.0 has shape \(3, 20, 6\), expected \(1, 20, 6"):
        open_set(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"hook_points_in": config["hook_points_in"][::-1]}, "in order"),
        ({"hook_points_out": config["hook_points_out"][:2]}, "must be equal lists"),
        ({"act_fn": "layertopk"}, "over a batch or over layers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            open_set(tmp_path)


def test_only_what_is_used_comes_down(hub: HubServer, tmp_path: Path) -> None:
    files = llamascopium(tmp_path / "local")
    llamascopium(tmp_path / "local", "lorsa/8x/k4", sae_type="lorsa")
    hub.add("me/scope", folder_bytes(tmp_path / "local"))
    opened = open_set("me/scope/transcoder/8x/k4", layers=[1])
    x = random(5, 7, D)
    expected = reference(x, files[sorted(files)[1]], 1, "jumprelu", True)
    torch.testing.assert_close(opened[1](x), expected, rtol=1e-4, atol=1e-5)
    weights = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert weights == ["transcoder/8x/k4/layer1_8x_k4/sae_weights.safetensors"]
    assert not any("lorsa" in name for name in hub.downloads())
    assert opened.provenance["subfolder"] == "transcoder/8x/k4"

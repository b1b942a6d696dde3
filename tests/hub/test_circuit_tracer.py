"""circuit-tracer's layouts, written by hand and compared with its forward pass spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import damage_weights, random, write_tensors

D, F = 6, 20
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out"}


def layer_tensors(seed: int, width: int = F, **more: Tensor) -> dict[str, Tensor]:
    return {
        "W_enc": random(seed, width, D),
        "b_enc": random(seed + 1, width),
        "W_dec": random(seed + 2, width, D),
        "b_dec": random(seed + 3, D),
        **more,
    }


def write_set(folder: Path, layers: list[dict[str, Tensor]], **config: Any) -> None:
    for layer, tensors in enumerate(layers):
        write_tensors(folder / f"layer_{layer}.safetensors", tensors)
    keys = {"model_name": "owner/model", "model_kind": "transcoder_set", **HOOKS, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))


def linear(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return x @ w["W_enc"].T + w["b_enc"]


def test_relu_with_skip(tmp_path: Path) -> None:
    weights = [layer_tensors(10 * i, W_skip=random(99 + i, D, D)) for i in range(2)]
    write_set(tmp_path, weights, scan="somewhere")
    opened = TranscoderSet.from_pretrained(tmp_path)
    x = random(5, 3, D)
    for layer, w in enumerate(weights):
        expected = torch.relu(linear(x, w)) @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T
        torch.testing.assert_close(opened[layer](x), expected)
    config = opened.config(0)
    assert (config.activation, config.skip, config.leading_positions) == ("relu", True, 1)
    assert (config.input_site, config.output_site) == ("R", "O")
    assert config.base_model == "owner/model"
    assert config.extra == {"scan": "somewhere"}
    assert opened.provenance["format"] == "circuit-tracer"
    assert opened.provenance["config"]["scan"] == "somewhere"
    assert opened.provenance["folder"] == str(tmp_path)


@pytest.mark.parametrize("key", ["activation_function.threshold", "threshold"])
def test_jumprelu(key: str, tmp_path: Path) -> None:
    w = layer_tensors(1, **{key: random(7, F).abs()})
    write_set(tmp_path, [w])
    opened = TranscoderSet.from_pretrained(tmp_path)
    x = random(5, 3, D)
    z = linear(x, w)
    torch.testing.assert_close(opened[0](x), (z * (z > w[key])) @ w["W_dec"] + w["b_dec"])


def topk_reference(x: Tensor, w: dict[str, Tensor], k: int) -> Tensor:
    z = linear(x, w)
    kept = torch.zeros_like(z)
    for row in range(len(z)):
        for feature in z[row].argsort(descending=True)[:k].tolist():
            kept[row, feature] = z[row, feature]
    return kept @ w["W_dec"] + w["b_dec"]


def test_topk_has_no_relu(tmp_path: Path) -> None:
    w = layer_tensors(1)
    x = random(5, 3, D)
    write_set(tmp_path, [w], activation="topk")
    with pytest.raises(CheckpointError, match=r"neither config.yaml .* say k .*pass k=\.\.\."):
        TranscoderSet.from_pretrained(tmp_path)
    opened = TranscoderSet.from_pretrained(tmp_path, k=18)  # reaches into negative values
    assert (linear(x, w) > 0).sum(-1).max() < 18
    torch.testing.assert_close(opened[0](x), topk_reference(x, w, 18))

    write_set(tmp_path, [w], activation="topk", k=5)
    assert TranscoderSet.from_pretrained(tmp_path).config(0).k == 5
    assert TranscoderSet.from_pretrained(tmp_path, k=2).config(0).k == 2
    write_set(tmp_path, [{**w, "k": torch.tensor(7)}], activation="topk")
    opened = TranscoderSet.from_pretrained(tmp_path)
    torch.testing.assert_close(opened[0](x), topk_reference(x, w, 7))


def test_older_files_hold_the_decoder_transposed(tmp_path: Path) -> None:
    w = layer_tensors(1)
    write_set(tmp_path, [{**w, "W_dec": w["W_dec"].T}])
    opened = TranscoderSet.from_pretrained(tmp_path)
    assert torch.equal(opened.rows(0, [3, 1, 2]), w["W_dec"][[3, 1, 2]])
    x = random(5, 3, D)
    expected = torch.relu(linear(x, w)) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(opened[0](x), expected)
    torch.testing.assert_close(opened[0].decode(opened[0].encode(x), sparse=True), expected)


def test_a_square_decoder_is_ambiguous(tmp_path: Path) -> None:
    w = layer_tensors(1, width=D)
    write_set(tmp_path, [w])
    with pytest.raises(CheckpointError, match="square .*decoder_layout='rows' or"):
        TranscoderSet.from_pretrained(tmp_path)
    rows = TranscoderSet.from_pretrained(tmp_path, decoder_layout="rows")[0]
    columns = TranscoderSet.from_pretrained(tmp_path, decoder_layout="columns")[0]
    assert torch.equal(rows.W_dec, w["W_dec"])
    assert torch.equal(columns.W_dec, w["W_dec"].T)
    with pytest.raises(ConfigError, match="decoder_layout must be one of rows, columns"):
        TranscoderSet.from_pretrained(tmp_path, decoder_layout="diagonal")
    write_set(tmp_path, [layer_tensors(1)])
    with pytest.raises(CheckpointError, match=r"W_dec has shape \(20, 6\), expected"):
        TranscoderSet.from_pretrained(tmp_path, decoder_layout="columns")


@pytest.mark.parametrize(
    ("reads", "writes", "sites"),
    [
        ("hook_resid_mid", "hook_mlp_out", ("R", "O'")),
        ("hook_mlp_in", "mlp.hook_out", ("R", "O")),
        ("ln2.hook_normalized", "hook_mlp_out", ("N0", "O'")),
        ("blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out", ("N1", "O'")),
    ],
)
def test_hooks(reads: str, writes: str, sites: tuple[str, str], tmp_path: Path) -> None:
    write_set(tmp_path, [layer_tensors(1)], feature_input_hook=reads, feature_output_hook=writes)
    config = TranscoderSet.from_pretrained(tmp_path).config(0)
    assert (config.input_site, config.output_site) == sites


def test_hooks_that_are_not_known(tmp_path: Path) -> None:
    write_set(tmp_path, [layer_tensors(1)], feature_input_hook="hook_resid_pre")
    with pytest.raises(CheckpointError, match="'hook_resid_pre'.*known input hooks are .*N1"):
        TranscoderSet.from_pretrained(tmp_path)
    assert TranscoderSet.from_pretrained(tmp_path, input_site="N1").config(0).input_site == "N1"
    with pytest.raises(ConfigError, match="input_site must be one of R, N0, N1"):
        TranscoderSet.from_pretrained(tmp_path, input_site="mlp")


def test_without_config_the_sites_must_be_given(tmp_path: Path) -> None:
    write_set(tmp_path, [layer_tensors(1)])
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="no config.yaml.*does not name the input hook"):
        TranscoderSet.from_pretrained(tmp_path)
    opened = TranscoderSet.from_pretrained(
        tmp_path, input_site="N1", output_site="O", leading_positions=0
    )
    assert opened.config(0).leading_positions == 0


def test_opening_reads_no_weight_and_layers_are_chosen(tmp_path: Path) -> None:
    write_set(tmp_path, [layer_tensors(i) for i in range(3)])
    damage_weights(tmp_path / "layer_1.safetensors")
    (tmp_path / "layer_2.safetensors").write_bytes(b"")
    assert TranscoderSet.from_pretrained(tmp_path, layers=[0, 1]).layers == (0, 1)
    with pytest.raises(CheckpointError, match="layer_2.safetensors cannot be read"):
        TranscoderSet.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="NaN"):
        TranscoderSet.from_pretrained(tmp_path, layers=[1])[1]


def test_files_named_in_the_config(tmp_path: Path) -> None:
    write_set(tmp_path, [layer_tensors(1), layer_tensors(9)])
    listed = {"transcoders": ["layer_1.safetensors", "layer_0.safetensors"]}
    write_set(tmp_path, [layer_tensors(1), layer_tensors(9)], **listed)
    assert torch.equal(TranscoderSet.from_pretrained(tmp_path)[0].b_enc, random(10, F))
    write_set(tmp_path, [layer_tensors(1)], transcoders=["../secret.safetensors"])
    with pytest.raises(CheckpointError, match="outside of itself"):
        TranscoderSet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"W_dec": random(1, F, D + 1)}, {}, r"W_dec has shape \(20, 7\), expected \(20, 6\)"),
        ({"W_enc": random(1, D, F)}, {}, r"W_enc has shape \(6, 20\), expected \(20, 20\)"),
        ({"b_enc": None}, {}, "has no tensor b_enc; it has W_dec"),
        ({"b_enc": random(1, 1, F)}, {}, r"b_enc has shape \(1, 20\), expected 1 dim"),
        ({"W_gate": random(1, F)}, {}, "W_gate that the config does not account for"),
        ({"W_skip": random(1, D, D - 1)}, {}, "W_skip has shape"),
        ({}, {"activation": "gelu"}, "names the activation 'gelu'; known: relu, topk"),
        ({}, {"activation": "jumprelu"}, "has no threshold"),
        ({"threshold": random(1, F)}, {"activation": "relu"}, "has a threshold"),
        ({}, {"activation": "topk", "k": "many"}, "say k as a number"),
        ({}, {"model_kind": "sae"}, "model_kind 'sae'; known: transcoder_set"),
    ],
)
def test_what_does_not_fit(
    tensors: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    layer = {k: v for k, v in (layer_tensors(1) | tensors).items() if v is not None}
    write_set(tmp_path, [layer], **config)
    with pytest.raises(CheckpointError, match=message):
        TranscoderSet.from_pretrained(tmp_path)


def test_yaml_is_data_only(tmp_path: Path) -> None:
    write_set(tmp_path, [layer_tensors(1)])
    for text, message in (
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("[1, 2]", "should hold a mapping"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            TranscoderSet.from_pretrained(tmp_path)


def write_cross_layer(folder: Path, n: int, threshold: bool) -> list[dict[str, Tensor]]:
    layers = []
    for i in range(n):
        encoder = {
            f"W_enc_{i}": random(10 * i, F, D),
            f"b_enc_{i}": random(10 * i + 1, F),
            f"b_dec_{i}": random(10 * i + 2, D),
        }
        if threshold:
            encoder[f"threshold_{i}"] = random(10 * i + 3, F).abs()
        decoder = {f"W_dec_{i}": random(10 * i + 4, F, n - i, D)}
        write_tensors(folder / f"W_enc_{i}.safetensors", encoder)
        write_tensors(folder / f"W_dec_{i}.safetensors", decoder)
        layers.append(encoder | decoder)
    keys = {"model_name": "owner/model", "model_kind": "cross_layer_transcoder", **HOOKS}
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    return layers


@pytest.mark.parametrize("threshold", [False, True])
def test_cross_layer(threshold: bool, tmp_path: Path) -> None:
    n = 3
    layers = write_cross_layer(tmp_path, n, threshold)
    opened = TranscoderSet.from_pretrained(tmp_path)
    assert opened.cross_layer
    x = {i: random(50 + i, 4, D) for i in range(n)}
    features = {}
    for i, w in enumerate(layers):
        z = x[i] @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"]
        features[i] = z * (z > w[f"threshold_{i}"]) if threshold else torch.relu(z)
        torch.testing.assert_close(opened[i].encode(x[i]), features[i])
    for target in range(n):
        expected = layers[target][f"b_dec_{target}"].expand(4, D)
        for i in range(target + 1):
            expected = expected + features[i] @ layers[i][f"W_dec_{i}"][:, target - i]
        torch.testing.assert_close(opened.decode(target, features), expected)
    assert torch.equal(opened.rows(1, [4, 2]), layers[1]["W_dec_1"][[4, 2]])


def test_cross_layer_damage(tmp_path: Path) -> None:
    write_cross_layer(tmp_path, 3, False)
    with pytest.raises(InputError, match="cannot be cut"):
        TranscoderSet.from_pretrained(tmp_path, layers=[0, 1])
    with pytest.raises(ConfigError, match="k: for per-layer sets"):
        TranscoderSet.from_pretrained(tmp_path, k=3)
    write_tensors(tmp_path / "W_dec_1.safetensors", {"W_dec_1": random(1, F, 3, D)})
    with pytest.raises(CheckpointError, match=r"W_dec_1 has shape \(20, 3, 6\), expected \(20, 2"):
        TranscoderSet.from_pretrained(tmp_path)
    (tmp_path / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers \[0, 2\]; .*all of them"):
        TranscoderSet.from_pretrained(tmp_path)


def test_cross_layer_skip_paths(tmp_path: Path) -> None:
    layers = write_cross_layer(tmp_path, 2, False)
    skips = [random(90 + i, D, D) for i in range(2)]
    for i, w in enumerate(layers):
        kept = {key: tensor for key, tensor in w.items() if not key.startswith("W_dec")}
        write_tensors(tmp_path / f"W_enc_{i}.safetensors", kept | {f"W_skip_{i}": skips[i]})
    x = {i: random(50 + i, 4, D) for i in range(2)}
    found = TranscoderSet.from_pretrained(tmp_path).cross_layer_transcoder()(x)
    acts = [torch.relu(x[i] @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"]) for i, w in enumerate(layers)]
    expected = acts[0] @ layers[0]["W_dec_0"][:, 1] + acts[1] @ layers[1]["W_dec_1"][:, 0]
    torch.testing.assert_close(found[1], expected + layers[1]["b_dec_1"] + x[1] @ skips[1].T)


def test_leading_positions_of_gemma_3(tmp_path: Path) -> None:
    for model, leading in (("google/gemma-3-1b-it", 4), ("google/gemma-3-1b-pt", 1)):
        write_set(tmp_path, [layer_tensors(1)], model_name=model)
        assert TranscoderSet.from_pretrained(tmp_path).config(0).leading_positions == leading


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "model_name: !!python/object/apply:os.system ['touch {marker}']",
        "model_name: !!python/name:os.system",
        "transcoders:\n  - !!python/object/new:os.system ['touch {marker}']",
        "a: &a [x]\nb: [*c]",
    ],
)
def test_a_malicious_yaml_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "config.yaml").write_text(text.format(marker=marker))
    write_tensors(folder / "layer_0.safetensors", {"W_enc": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        TranscoderSet.from_pretrained(folder)
    assert not marker.exists()

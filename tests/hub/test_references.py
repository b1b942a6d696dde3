"""``config.yaml`` that refers to files of other repositories, on the loopback Hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save as save_bytes
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.hub.references import parse_reference
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import random
from .hub_server import TOKEN, HubServer

D, F = 6, 20
HOOKS = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}

open_set = TranscoderSet.from_pretrained


def config(references: list[str], **changes: Any) -> bytes:
    keys = {
        "model_name": "owner/model",
        "model_kind": "transcoder_set",
        "transcoders": references,
        **HOOKS,
        **changes,
    }
    return yaml.safe_dump(keys).encode()


def tracer_layer(seed: int) -> dict[str, Tensor]:
    return {
        "W_enc": random(seed, F, D),
        "b_enc": random(seed + 1, F),
        "W_dec": random(seed + 2, F, D),
        "b_dec": random(seed + 3, D),
    }


def gemma_arrays(seed: int) -> dict[str, Tensor]:
    return {
        "W_enc": random(seed, D, F),
        "b_enc": random(seed + 1, F),
        "W_dec": random(seed + 2, F, D),
        "b_dec": random(seed + 3, D),
        "threshold": random(seed + 4, F).abs(),
    }


def npz(arrays: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: tensor.numpy() for name, tensor in arrays.items()})
    return stream.getvalue()


def jumprelu(x: Tensor, w: dict[str, Tensor], enc: str = "W_enc", dec: str = "W_dec") -> Tensor:
    z = x @ w[enc] + w["b_enc"]
    return (z * (z > w["threshold"])) @ w[dec] + w["b_dec"]


def test_layers_of_circuit_tracer(hub: HubServer) -> None:
    layers = [tracer_layer(1), tracer_layer(11)]
    files = {f"layer_{n}.safetensors": save_bytes(w) for n, w in enumerate(layers)}
    target = hub.add("them/weights", files)
    commit = target.refs["main"]
    target.commit(dict.fromkeys(files, b"changed"))
    names = [f"hf://them/weights/layer_{n}.safetensors?revision={commit}" for n in range(2)]
    hub.add("me/set", {"config.yaml": config(names)})
    opened = open_set("me/set")
    assert opened.layers == (0, 1)
    x = random(5, 3, D)
    for layer, w in enumerate(layers):
        expected = torch.relu(x @ w["W_enc"].T + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
        torch.testing.assert_close(opened[layer](x), expected)
        assert torch.equal(opened.rows(layer, [3, 1]), w["W_dec"][[3, 1]])
    made = opened.config(1)
    assert (made.input_site, made.output_site, made.leading_positions) == ("N0", "O'", 1)
    provenance = opened.provenance
    assert provenance["repository"] == "me/set"
    assert provenance["references"]["1"]["repository"] == "them/weights"
    assert provenance["references"]["1"]["revision"] == commit


def test_gemma_scope_files(hub: HubServer) -> None:
    layers = [gemma_arrays(1), gemma_arrays(11)]
    paths = ["layer_0/width_16k/average_l0_76", "layer_1/width_16k/average_l0_65"]
    files = {f"{path}/params.npz": npz(w) for path, w in zip(paths, layers, strict=True)}
    files |= {"layer_1/width_16k/average_l0_5/params.npz": npz(gemma_arrays(99))}
    hub.add("google/scope", files)
    names = [f"hf://google/scope/{path}/params.npz" for path in paths]
    hub.add("me/set", {"config.yaml": config(names, model_name="google/gemma-2-2b")})
    opened = open_set("me/set")
    assert opened.config(1).base_model == "google/gemma-2-2b"
    x = random(5, 3, D)
    for layer, w in enumerate(layers):
        torch.testing.assert_close(opened[layer](x), jumprelu(x, w))
    assert opened.provenance["references"]["0"]["format"] == "gemma-scope"
    assert not any("average_l0_5/" in name for name in hub.downloads())


def test_gemma_scope_2_files(hub: HubServer) -> None:
    layers = [gemma_arrays(1), gemma_arrays(11)]
    files, names = {}, []
    for n, w in enumerate(layers):
        l0 = "small" if n else "big"  # sets may mix sparsities
        path = f"transcoder_all/layer_{n}_width_16k_l0_{l0}_affine/params.safetensors"
        stored = {k.replace("W_", "w_"): t for k, t in w.items()}
        stored["affine_skip_connection"] = random(70 + n, D, D)
        files[path] = save_bytes(stored)
        names.append(f"hf://google/scope-2/{path}?revision=main")
    hub.add("google/scope-2", files)
    hooks = {"feature_input_hook": "mlp.hook_in", "model_name": "google/gemma-3-1b-it"}
    hub.add("me/set", {"config.yaml": config(names, **hooks)})
    opened = open_set("me/set")
    assert (opened.config(0).input_site, opened.config(0).leading_positions) == ("N1", 4)
    x = random(5, 3, D)
    for layer, w in enumerate(layers):
        expected = jumprelu(x, w) + x @ random(70 + layer, D, D)
        torch.testing.assert_close(opened[layer](x), expected)


def test_each_repository_is_resolved_once_and_layers_are_chosen(hub: HubServer) -> None:
    files = {f"layer_{n}.safetensors": save_bytes(tracer_layer(n)) for n in range(4)}
    hub.add("them/weights", files)
    hub.add("me/set", {"config.yaml": config([f"hf://them/weights/{name}" for name in files])})
    opened = open_set("me/set", layers=[1, 3])
    assert opened.layers == (1, 3)
    opened[3]
    assert set(hub.downloads()) == {"config.yaml", "layer_1.safetensors", "layer_3.safetensors"}
    asked = [r.path for r in hub.requests if r.path == "/api/models/them/weights/revision/main"]
    assert len(asked) <= 1
    with pytest.raises(InputError, match="has layers"):
        open_set("me/set", layers=[4])


def test_token_cache_and_a_local_config(hub: HubServer, tmp_path: Path) -> None:
    hub.add("them/weights", {"layer_0.safetensors": save_bytes(tracer_layer(1))}, private=True)
    (tmp_path / "set").mkdir()
    text = config(["hf://them/weights/layer_0.safetensors"])
    (tmp_path / "set" / "config.yaml").write_bytes(text)
    with pytest.raises(CheckpointError, match="(?s)them/weights: .*Next: check the spelling"):
        open_set(tmp_path / "set")
    cache = tmp_path / "cache"
    opened = open_set(tmp_path / "set", token=TOKEN, cache_dir=cache)
    assert torch.equal(opened[0].b_enc, random(2, F))
    again = open_set(tmp_path / "set", cache_dir=cache, local_files_only=True)
    assert torch.equal(again[0].b_enc, random(2, F))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("https://example.org/layer_0.safetensors", "only hf://"),
        ("file:///etc/passwd", "only hf://"),
        ("s3://bucket/layer_0.safetensors", "only hf://"),
        ("HTTP://example.org/x", "only hf://"),
        ("hf:them/weights/layer_0.safetensors", "not of the form"),
        ("hf://them/weights", "not of the form"),
        ("hf://them/weights/", "not of the form"),
        ("hf:///etc/passwd", "not of the form"),
        ("hf://user@them/weights/x", "not of the form"),
        ("hf://them:80/weights/x", "not of the form"),
        ("hf://them/../secret/x", "not of the form"),
        ("hf://them/weights/../other/x", "leads out of its repository"),
        ("hf://them/weights/a/../../../x", "leads out of its repository"),
        ("hf://them/weights/..%2f..%2fx", "leads out of its repository"),
        ("hf://them/weights/a\\..\\x", "leads out of its repository"),
        ("hf://them/weights/x?revision=a&token=b", "more than a revision: token"),
        ("hf://them/weights/x?revision=a&revision=b", "more than a revision"),
        ("hf://them/weights/x#fragment", "more than a revision: fragment"),
        ("hf://them/weights/x?revision", "cannot be read"),
        ("hf://[them/weights/x", "cannot be read"),
    ],
)
def test_references_that_are_refused(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_reference(reference, "config.yaml")
    (tmp_path / "config.yaml").write_bytes(config([reference]))
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


def test_what_references_cannot_do(hub: HubServer, tmp_path: Path) -> None:
    hub.add("them/weights", {"layer_1.safetensors": save_bytes(tracer_layer(1))})
    name = "hf://them/weights/layer_1.safetensors"
    for references, message in (
        ([name], "as layer 0, but by its name it is of layer 1"),
        (["hf://them/weights/layer_0.safetensors"], "has no file layer_0.safetensors"),
        ([name.replace("?", "") + "?revision=v9"], "Next: pass revision="),
        (["layer_0.safetensors", name], "only hf://owner/name/file is followed"),
        (["hf://them/none/layer_0.safetensors"], "Next: check the spelling"),
    ):
        (tmp_path / "config.yaml").write_bytes(config(references))
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            open_set(tmp_path)
    (tmp_path / "config.yaml").write_bytes(config([name], model_kind="cross_layer_transcoder"))
    with pytest.raises(CheckpointError, match="which only a per-layer set can"):
        open_set(tmp_path)
    (tmp_path / "config.yaml").write_bytes(config([name], transcoders={"0": name}))
    with pytest.raises(CheckpointError, match="transcoders should be a list"):
        open_set(tmp_path)


def test_options_that_the_target_does_not_have(hub: HubServer) -> None:
    path = "layer_0/width_16k/average_l0_76/params.npz"
    hub.add("google/scope", {path: npz(gemma_arrays(1))})
    hub.add("me/set", {"config.yaml": config([f"hf://google/scope/{path}"])})
    with pytest.raises(ConfigError, match="decoder_layout: of no use for .*'gemma-scope'"):
        open_set("me/set", decoder_layout="rows")

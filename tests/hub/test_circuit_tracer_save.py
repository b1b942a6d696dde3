"""Saving in circuit-tracer's layout: what it writes, and what it cannot express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from nnsight_transcoders.errors import ConfigError, InputError
from nnsight_transcoders.hub.circuit_tracer import save_circuit_tracer
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import folder_bytes, make_set, random


@pytest.mark.parametrize(
    "fields",
    [
        {"skip": True},
        {"activation": "jumprelu"},
        {"activation": "topk", "k": 3, "relu_first": False},
        {"cross_layer": True, "activation": "jumprelu"},
    ],
)
def test_saving(fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_set(dtype="bfloat16", input_site="N0", output_site="O'", base_model="a/b", **fields)
    opened = TranscoderSet.from_pretrained(save_circuit_tracer(made, tmp_path))
    assert ("read this set as ReLU" in caplog.text) == ("k" in fields)
    assert opened.provenance["format"] == "circuit-tracer"
    for layer in made.layers:
        own, loaded = made[layer].state_dict(), opened[layer].state_dict()
        assert own.keys() == loaded.keys()
        assert all(torch.equal(own[name], loaded[name]) for name in own)
        same = ("input_site", "output_site", "activation", "k", "relu_first", "base_model", "dtype")
        for name in same:
            assert getattr(opened.config(layer), name) == getattr(made.config(layer), name)


def test_saved_names_are_circuit_tracers(tmp_path: Path) -> None:
    save_circuit_tracer(make_set((0,), activation="jumprelu"), tmp_path)
    with safe_open(tmp_path / "layer_0.safetensors", "pt") as handle:
        assert set(handle.keys()) == {
            *("W_enc", "b_enc", "W_dec", "b_dec", "activation_function.threshold")
        }
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }


@pytest.mark.parametrize("threshold", [0.5, -0.5])
def test_batchtopk_is_saved_as_jumprelu(threshold: float, tmp_path: Path) -> None:
    made = make_set((0,), activation="batchtopk")
    with torch.no_grad():
        made[0].activation.threshold.fill_(threshold)
    opened = TranscoderSet.from_pretrained(save_circuit_tracer(made, tmp_path))
    x = random(1, 50, 6)
    assert torch.equal(opened[0].encode(x), made[0].encode(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "grouptopk", "k": 2, "n_groups": 4}, "activation grouptopk"),
        ({"activation": "topk", "k": 3}, "activation topk with a ReLU first"),
        ({"cross_layer": True, "skip": True}, "cross-layer set with skip"),
    ],
)
def test_what_cannot_be_saved(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        save_circuit_tracer(make_set(**fields), tmp_path)
    with pytest.raises(InputError, match="all layers from 0 on"):
        save_circuit_tracer(make_set((1, 2)), tmp_path)
    mixed = {i: make_set((i,), input_site=site)[i] for i, site in enumerate(("R", "N1"))}
    with pytest.raises(ConfigError, match="one input_site for all layers; layer 1 has 'N1'"):
        save_circuit_tracer(TranscoderSet.from_transcoders(mixed), tmp_path)
    assert folder_bytes(tmp_path) == {}

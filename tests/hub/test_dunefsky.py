"""The paper's pickles, written with ``torch.save`` and compared with their forward pass."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import random

D, F = 6, 20
FILE = "final_sparse_autoencoder_gpt2-small_blocks.{}.ln2.hook_normalized_24576.pt"


@contextmanager
def training_package() -> Iterator[type]:
    """The package whose config class is in the pickles, while they are written."""
    package, module = types.ModuleType("sae_training"), types.ModuleType("sae_training.config")
    config = type("LanguageModelSAERunnerConfig", (), {"__module__": "sae_training.config"})
    module.LanguageModelSAERunnerConfig = config  # type: ignore[attr-defined]
    sys.modules.update({"sae_training": package, "sae_training.config": module})
    try:
        yield config
    finally:
        del sys.modules["sae_training"], sys.modules["sae_training.config"]


def weights(seed: int, **more: Tensor) -> dict[str, Tensor]:
    return {
        "W_enc": random(seed, D, F),
        "b_enc": random(seed + 1, F),
        "W_dec": random(seed + 2, F, D),
        "b_dec": random(seed + 3, D),
        "b_dec_out": random(seed + 4, D),
        **more,
    }


def write_layer(
    folder: Path, layer: int, state: dict[str, Tensor], *, legacy: bool = False, **cfg: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE.format(layer)
    values = {
        "model_name": "gpt2-small",
        "hook_point": f"blocks.{layer}.ln2.hook_normalized",
        "out_hook_point": f"blocks.{layer}.hook_mlp_out",
        "is_transcoder": True,
        "d_in": D,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "lr": 4e-4,
        "dead_feature_estimation_method": None,
    }
    with training_package() as config:
        record = config()
        vars(record).update(values | cfg)
        holder = nn.Module()
        for name, tensor in state.items():
            holder.register_parameter(name, nn.Parameter(tensor, tensor.is_floating_point()))
        content = {"cfg": record, "state_dict": holder.state_dict()}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def opened(folder: Path, **options: Any) -> TranscoderSet:
    return TranscoderSet.from_pretrained(folder, cache_dir=folder.parent / "cache", **options)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward(legacy: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    states = {layer: weights(10 * layer) for layer in (0, 8, 11)}
    for layer, state in states.items():
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        write_layer(folder, layer, stored, legacy=legacy)
        sparsity = folder / FILE.format(layer).replace(".pt", "_log_feature_sparsity.pt")
        torch.save(torch.zeros(F), sparsity)
    found = opened(folder)
    assert found.layers == (0, 8, 11)
    x = random(5, 7, D)
    for layer, w in states.items():
        hidden = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        expected = hidden @ w["W_dec"] + w["b_dec_out"]
        tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
        torch.testing.assert_close(found[layer](x), expected, **tolerance)
        assert found.config(layer).dtype == str(dtype).removeprefix("torch.")
        again = opened(folder)
        rows = again.rows(layer, [4, 2], "encoder")
        assert torch.equal(rows, w["W_enc"].to(dtype).T[[4, 2]])
        assert torch.equal(again.rows(layer, [4, 2]), w["W_dec"].to(dtype)[[4, 2]])
    config = found.config(8)
    assert (config.input_site, config.output_site, config.leading_positions) == ("N0", "O'", 0)
    assert config.base_model == "openai-community/gpt2"
    provenance = found.provenance
    assert provenance["format"] == "dunefsky"
    assert provenance["files"] == sorted(FILE.format(layer) for layer in states)
    assert "b_enc <- b_enc - W_enc @ b_dec" in provenance["folds"][0]
    assert "minus its mean" in provenance["folds"][1]
    assert provenance["config"]["8"]["hook_point"] == "blocks.8.ln2.hook_normalized"
    assert provenance["config"]["8"]["dtype"] == "torch.float32"


def test_layers_and_laziness(tmp_path: Path) -> None:
    for layer in (0, 1):
        write_layer(tmp_path / "set", layer, weights(layer))
    (tmp_path / "set" / FILE.format(1)).write_bytes(b"not a pickle")
    assert opened(tmp_path / "set", layers=[0]).layers == (0,)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing converted yet
    with pytest.raises(CheckpointError, match=r"blocks.1.*no complete pickle"):
        opened(tmp_path / "set")
    with pytest.raises(InputError, match=r"not \[7\]"):
        opened(tmp_path / "set", layers=[7])


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights(0).items() if key != name}


@pytest.mark.parametrize(
    ("state", "cfg", "message"),
    [
        (without("b_dec_out"), {}, "no b_dec_out: it is an autoencoder"),
        (without("W_dec"), {}, "lacks W_dec"),
        (weights(0, W_skip=random(1, D, D)), {}, "has 'W_skip' too many"),
        (weights(0, W_enc=random(1, F, D)), {}, "do not fit together"),
        (weights(0, W_enc=random(1, F, D), W_dec=random(1, D, F)), {}, "do not fit together"),
        (weights(0, b_dec=random(1, D + 1)), {}, "do not fit together"),
        (weights(0, b_enc=torch.zeros(F, dtype=torch.int64)), {}, "no floating-point"),
        (weights(0), {"is_transcoder": False}, "autoencoder by its config"),
        (weights(0), {"hook_point": "blocks.0.hook_resid_pre"}, "names the hook .*input_site="),
    ],
)
def test_what_is_wrong(
    state: dict[str, Tensor], cfg: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_layer(tmp_path / "set", 0, state, **cfg)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "set")


def test_nan_and_truncation(tmp_path: Path) -> None:
    bad = weights(0)
    bad["W_dec"][3, 2] = float("nan")
    path = write_layer(tmp_path / "set", 0, bad)
    with pytest.raises(CheckpointError, match="W_dec holds NaN"):
        opened(tmp_path / "set")[0]
    for legacy in (False, True):
        path = write_layer(tmp_path / "set", 0, weights(0), legacy=legacy)
        whole = path.read_bytes()
        for keep in (3, 100, len(whole) // 2, len(whole) - 20):
            path.write_bytes(whole[:keep])
            with pytest.raises(CheckpointError, match="damaged|no complete pickle|cannot be read"):
                opened(tmp_path / "set")[0]


def test_a_plain_mapping_for_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    torch.save({"cfg": {"a": 1}, "state_dict": OrderedDict(weights(0))}, folder / FILE.format(3))
    assert opened(folder).provenance["config"]["3"] == {"a": 1}
    torch.save(weights(0), folder / FILE.format(3))
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        opened(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no final_sparse_autoencoder"):
        opened(tmp_path / "empty", format="dunefsky")

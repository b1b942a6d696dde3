"""tiny_model's torch files, written by torch and compared with the forward pass spelled out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import random
from .layouts import D, F, tiny_model


def open_set(folder: Path, **options: object) -> TranscoderSet:
    return TranscoderSet.from_pretrained(folder, cache_dir=folder / "cache", **options)


def test_forward_pass(tmp_path: Path) -> None:
    files = tiny_model(tmp_path)
    opened = open_set(tmp_path)
    assert opened.provenance["format"] == "tiny-model"
    config = opened.config(1)
    assert (config.input_site, config.output_site, config.activation) == ("R", "O", "relu")
    assert config.extra == {"n_features": F}
    assert opened.provenance["files"] == sorted(files)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing is converted yet
    x = random(5, 4, D)
    for layer, w in enumerate(files.values()):
        acts = torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"])
        expected = acts @ w["decoder.weight"].T + w["decoder.bias"]
        torch.testing.assert_close(opened[layer](x), expected)
        assert torch.equal(opened.rows(layer, [7, 2]), w["decoder.weight"].T[[7, 2]])


def test_variants(tmp_path: Path) -> None:
    files = tiny_model(tmp_path, ("S-3_R1_P0", "S-1_B0_P0"))
    assert opened_bias(tmp_path).equal(files["mlp_map_test/M0_S-3_R1_P0.pt"]["encoder.bias"])
    other = opened_bias(tmp_path, variant="S-1_B0_P0")
    assert other.equal(files["mlp_map_test/M0_S-1_B0_P0.pt"]["encoder.bias"])
    with pytest.raises(CheckpointError, match="no variant 'S-9'; pass variant=, one of S-1_B0_P0"):
        open_set(tmp_path, variant="S-9")


def opened_bias(folder: Path, **options: object) -> torch.Tensor:
    return open_set(folder, **options)[0].b_enc


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.weight": random(1, F, D)}, r"W_dec has shape \(6, 20\), expected \(20, 6\)"),
        ({"decoder.bias": None}, "should hold the tensors encoder.weight"),
        ({"threshold": random(1, F)}, "it holds .*threshold"),
        ({"encoder.bias": random(1, 1, F)}, r"shape \(1, 20\) and dtype torch.float32, expected 1"),
        ({"encoder.bias": torch.zeros(F, dtype=torch.int64)}, "dtype torch.int64"),
    ],
)
def test_what_does_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    files = tiny_model(tmp_path)
    name = "mlp_map_test/M0_S-3_R1_P0.pt"
    kept = {k: v for k, v in (files[name] | change).items() if v is not None}
    torch.save(kept, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        open_set(tmp_path)


class _Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.flag}",)


def test_damage_and_code(tmp_path: Path) -> None:
    files = tiny_model(tmp_path)
    name = "mlp_map_test/M0_S-3_R1_P0.pt"
    path = tmp_path / name
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[: len(whole) // 2], b"not a torch file"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            open_set(tmp_path)
    torch.save(files[name] | {"encoder.bias": torch.full((F,), torch.nan)}, path)
    with pytest.raises(CheckpointError, match="NaN"):
        open_set(tmp_path)[0]
    flag = tmp_path / "ran"
    torch.save(files[name] | {"evil": _Evil(flag)}, path)
    with pytest.raises(CheckpointError, match="system"):
        open_set(tmp_path)
    assert not flag.exists()

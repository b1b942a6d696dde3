"""Gemma Scope's npz layout, written with numpy and compared with its forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.hub.gemma_scope import LOWEST_L0
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import random

D, F = 6, 20


def arrays(seed: int, **more: Tensor) -> dict[str, Tensor]:
    return {
        "W_enc": random(seed, D, F),
        "W_dec": random(seed + 1, F, D),
        "b_enc": random(seed + 2, F),
        "b_dec": random(seed + 3, D),
        "threshold": random(seed + 4, F).abs(),
        **more,
    }


def write_layer(
    folder: Path,
    layer: int,
    l0: int,
    content: dict[str, Tensor],
    *,
    width: str = "16k",
    save: Callable[..., None] = np.savez,
) -> Path:
    path = folder / f"layer_{layer}" / f"width_{width}" / f"average_l0_{l0}" / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **{name: tensor.numpy() for name, tensor in content.items()})
    return path


def opened(folder: Path, **options: Any) -> TranscoderSet:
    return TranscoderSet.from_pretrained(folder, cache_dir=folder.parent / "cache", **options)


def l0s(transcoders: TranscoderSet) -> list[int]:
    return [
        int(transcoders.config(n).extra["variant"].rpartition("_")[2]) for n in transcoders.layers
    ]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_forward(save: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    content = {layer: arrays(10 * layer) for layer in (0, 3, 12)}
    for layer, tensors in content.items():
        write_layer(folder, layer, 30, tensors, save=save)
    found = opened(folder)
    assert found.layers == (0, 3, 12)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    x = random(5, 7, D)
    for layer, w in content.items():
        z = x @ w["W_enc"] + w["b_enc"]
        expected = (z * (z > w["threshold"])) @ w["W_dec"] + w["b_dec"]
        torch.testing.assert_close(found[layer](x), expected)
        assert torch.equal(found.rows(layer, [4, 2], "encoder"), w["W_enc"].T[[4, 2]])
        assert torch.equal(opened(folder).rows(layer, [4, 2]), w["W_dec"][[4, 2]])
    config = found.config(3)
    assert (config.input_site, config.output_site, config.activation) == ("N0", "O'", "jumprelu")
    assert config.leading_positions == 1
    assert not config.skip
    assert found.provenance["format"] == "gemma-scope"
    assert found.provenance["variants"]["3"] == "layer_3/width_16k/average_l0_30"
    assert found.provenance["files"][0] == "layer_0/width_16k/average_l0_30/params.npz"


def write_variants(folder: Path) -> None:
    for layer, values in {0: (12, 76, 200), 1: (9, 65, 150)}.items():
        for l0 in values:
            write_layer(folder, layer, l0, arrays(l0))


def test_the_choice_of_a_variant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "set"
    write_variants(folder)
    with caplog.at_level(logging.INFO, logger="nnsight_transcoders"):
        found = opened(folder)
    assert l0s(found) == [76, 65]  # the list that others use
    assert "layer_0/width_16k/average_l0_76, layer_1/width_16k/average_l0_65" in caplog.text
    assert l0s(opened(folder, l0=100)) == [76, 65]
    assert l0s(opened(folder, l0=140)) == [200, 150]
    assert l0s(opened(folder, l0=[1, 1000])) == [12, 150]
    assert l0s(opened(folder, l0={0: 1000, 1: 1})) == [200, 9]
    assert l0s(opened(folder, layers=[1], variant="average_l0_9")) == [9]
    assert l0s(opened(folder, layers=[1], variant="width_16k/average_l0_150")) == [150]
    assert l0s(opened(folder, variant=["average_l0_12", "width_16k/average_l0_9"])) == [12, 9]
    assert l0s(opened(folder, variant={"0": 200, "1": 9})) == [200, 9]
    write_layer(folder, 2, 33, arrays(3))  # not the set the list is about: the smallest
    assert l0s(opened(folder)) == [12, 9, 33]
    assert len(LOWEST_L0) == 26


def test_widths(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_layer(folder, 0, 10, arrays(1), width="65k")
    write_layer(folder, 0, 20, arrays(2), width="16k")
    write_layer(folder, 0, 20, arrays(3), width="1m")
    assert l0s(opened(folder)) == [20]
    assert opened(folder).config(0).extra["variant"] == "layer_0/width_16k/average_l0_20"
    assert l0s(opened(folder, width="65k")) == [10]
    assert l0s(opened(folder, variant="width_1m/average_l0_20")) == [20]
    with pytest.raises(CheckpointError, match="more than one variant 'average_l0_20'"):
        opened(folder, variant="average_l0_20")
    with pytest.raises(CheckpointError, match="no width_2k; it has width_16k, width_65k, width_1m"):
        opened(folder, width="2k")


def test_choices_that_are_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_variants(folder)
    with pytest.raises(CheckpointError, match="no variant 'average_l0_7'; it has .*average_l0_12"):
        opened(folder, variant="average_l0_7")
    with pytest.raises(CheckpointError, match="no variant"):
        opened(folder, layers=[0], variant="../../../etc")
    with pytest.raises(ConfigError, match="pass one of them"):
        opened(folder, variant="average_l0_76", l0=3)
    with pytest.raises(ConfigError, match="3 values for 2 layers"):
        opened(folder, l0=[1, 2, 3])
    with pytest.raises(ConfigError, match="says nothing of layer 1"):
        opened(folder, l0={0: 5})
    with pytest.raises(ConfigError, match="give a number"):
        opened(folder, l0="low")
    with pytest.raises(InputError, match=r"not \[5\]"):
        opened(folder, layers=[5])


@pytest.mark.parametrize(
    "content",
    [
        arrays(0, W_enc=random(1, F, D)),
        arrays(0, W_enc=random(1, F, D), W_dec=random(2, D, F)),
        arrays(0, threshold=random(1, F + 1)),
        arrays(0, W_enc=random(1, D)),
        arrays(0, extra=random(1, D)),
        {name: tensor for name, tensor in arrays(0).items() if name != "b_dec"},
        {},
    ],
)
def test_arrays_that_are_wrong(content: dict[str, Tensor], tmp_path: Path) -> None:
    write_layer(tmp_path / "set", 0, 5, content)
    with pytest.raises(CheckpointError, match="expected W_enc"):
        opened(tmp_path / "set")


def test_nan_and_truncation(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "set", 0, 5, arrays(0, b_dec=torch.full((D,), torch.inf)))
    with pytest.raises(CheckpointError, match="b_dec holds NaN or infinite"):
        opened(tmp_path / "set")[0]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="not a complete zip archive"):
        opened(tmp_path / "set")

"""Sets and files that the tests of several formats share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, TranscoderConfig


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(module: nn.Module, seed: int) -> None:
    """Give every weight random numbers; thresholds come out positive."""
    for index, (name, weight) in enumerate(module.named_parameters()):
        values = random(seed * 100 + index, *weight.shape)
        weight.data = (values.abs() if "threshold" in name else values).to(weight.dtype)


def make_set(
    layers: tuple[int, ...] = (0, 1, 2), *, cross_layer: bool = False, **fields: object
) -> TranscoderSet:
    """A set with random weights; ``fields`` are those of ``TranscoderConfig``."""
    modules: dict[int, Transcoder | CrossLayerPart] = {}
    for layer in layers:
        values = {"d_in": 6, "d_out": 6, "d_transcoder": 24, **fields}
        config = TranscoderConfig(layer=layer, **values)  # type: ignore[arg-type]
        if cross_layer:
            modules[layer] = CrossLayerPart(config, tuple(t for t in layers if t >= layer))
        else:
            modules[layer] = Transcoder(config)
        fill(modules[layer], layer + 1)
    return TranscoderSet.from_transcoders(modules)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def damage_weights(path: Path) -> None:
    """Overwrite a safetensors file's data with NaN; its header stays as it is."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    path.write_bytes(data)

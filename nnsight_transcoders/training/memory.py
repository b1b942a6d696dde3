"""Whether a run fits into memory, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from nnsight_transcoders.errors import ConfigError
from nnsight_transcoders.transcoder import TranscoderConfig, torch_dtype

from .config import TrainConfig

_GB = 1e9


def check_memory(
    config: TrainConfig, shapes: Mapping[int, TranscoderConfig], device: torch.device
) -> None:
    """Compare an estimate with the memory that is free on a device.

    Args:
        config: The run's.
        shapes: Layer -> its transcoder's config, of the layers that are trained on the device.
        device: Which.

    Raises:
        ConfigError: It does not fit; with the parts of the estimate, and what to lower.
    """
    free = free_memory(device)
    parts = estimate(config, shapes)
    total = sum(parts.values())
    if free is not None and total > free:
        listed = ", ".join(f"{name} {size / _GB:.1f}" for name, size in parts.items())
        raise ConfigError(
            f"training needs about {total / _GB:.1f} GB of memory ({listed}), but {device} has "
            f"{free / _GB:.1f} GB free: lower d_transcoder, buffer_size, batch_size or the number "
            "of layers"
        )


def estimate(config: TrainConfig, shapes: Mapping[int, TranscoderConfig]) -> dict[str, int]:
    """Bytes: of weights with gradients and optimiser, of the buffer, of a step."""
    weights = sum(_weights(shape, sorted(shapes)) for shape in shapes.values())
    states = 2 if config.optimizer.startswith(("Adam", "NAdam", "RAdam")) else 1
    first = next(iter(shapes.values()))
    sites = 1 if config.is_autoencoder else 2
    row = sites * first.d_in * len(shapes)
    buffer = 0 if config.end_to_end else config.buffer_size * row
    # Pre-activations, their copy, and a gradient where the activation is dense.
    wide = 4 if config.activation in ("relu", "jumprelu") else 2
    together = len(shapes) if config.cross_layer or config.end_to_end else 1
    step = config.batch_size * (first.d_transcoder * wide * together + 4 * row)
    return {
        "weights and optimiser": 4 * weights * (2 + states),
        "buffer": buffer * torch_dtype(config.buffer_dtype).itemsize,
        "one step": 4 * step,
    }


def _weights(shape: TranscoderConfig, layers: list[int]) -> int:
    targets = sum(layer >= shape.layer for layer in layers) if shape.cross_layer else 1
    skip = shape.d_in * shape.d_out if shape.skip else 0
    return shape.d_transcoder * (shape.d_in + 2 + targets * shape.d_out) + shape.d_out + skip


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [_available(), _cgroup()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _available() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _cgroup() -> int | None:
    """What a container's limit leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)

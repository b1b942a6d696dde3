"""The numbers of a step, as the log and the model card have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .config import TrainConfig
from .group import LayerStats
from .processes import Processes
from .steps import Steps


def step_numbers(
    steps: Steps,
    loss: float,
    stats: Mapping[int, LayerStats],
    config: TrainConfig,
    processes: Processes,
) -> dict[str, float]:
    """A step's numbers: means over layers, and ``layer_3/l0``. All processes call it."""
    layers = {layer: learner.group for learner in steps.learners for layer in learner.group.layers}
    own = {n: _layer_numbers(stats[n], group.idle(n), config) for n, group in layers.items()}
    if config.parallel == "layers":
        gathered = processes.gather([(loss, own)])
        loss = sum(one for one, _ in gathered)
        own = {n: numbers for _, part in gathered for n, numbers in part.items()}
    found = {"loss": loss}
    for name in next(iter(own.values())):
        found[name] = sum(numbers[name] for numbers in own.values()) / len(own)
    for layer in sorted(own):
        found |= {f"layer_{layer}/{name}": value for name, value in own[layer].items()}
    return found


def _layer_numbers(seen: LayerStats, idle: Tensor, config: TrainConfig) -> dict[str, float]:
    numbers = {} if seen.fvu is None else {"fvu": float(seen.fvu)}
    dead = (idle >= config.dead_after).float().mean()
    return numbers | {"l0": float(seen.l0), "dead": float(dead)}


def by_layer(values: Mapping[str, float]) -> dict[Any, Any]:
    """``layer_3/l0`` -> ``{3: {"l0": ...}}``, as the model card has it."""
    layers: dict[Any, Any] = {}
    for name, value in values.items():
        layer, _, what = name.removeprefix("layer_").partition("/")
        if what:
            layers.setdefault(int(layer), {})[what] = value
    return layers | ({"ce_change": values["ce_change"]} if "ce_change" in values else {})

"""One optimiser step of one group: schedule, gradient, clipping, constraints (torch only)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import ConfigError, TrainingError

from .config import TrainConfig
from .group import Group, LayerStats
from .processes import Processes


def learning_rate(step: int, config: TrainConfig, peak: float) -> float:
    """Linear warm-up, a plateau until ``decay_start``, then down to ``final_lr`` of the peak."""
    steps = config.steps
    warmup = round(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    begin = max(warmup, round(config.decay_start * steps))
    if config.decay == "constant" or step < begin:
        return peak
    progress = (step - begin) / max(1, steps - begin)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return peak * (config.final_lr + (1 - config.final_lr) * fall)


def sparsity_weight(step: int, config: TrainConfig) -> float:
    """The penalty's factor: it rises linearly over ``sparsity_warmup`` of the steps."""
    rise = round(config.sparsity_warmup * config.steps)
    return config.sparsity_weight * min(1.0, (step + 1) / max(1, rise))


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """An optimiser of ``torch.optim`` by name; fused where it can be.

    Raises:
        ConfigError: No such optimiser, or options that it does not take.
    """
    kind = getattr(torch.optim, config.optimizer, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"torch.optim has no optimiser {config.optimizer!r}")
    options: dict[str, Any] = {"lr": 1.0, **config.optimizer_options}
    if "fused" in inspect.signature(kind).parameters and "foreach" not in options:
        options.setdefault("fused", True)
    try:
        return kind(parameters, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer {config.optimizer!r} cannot be made: {error}") from error


@dataclass(frozen=True)
class StepStats:
    """A step in numbers, by layer."""

    loss: float
    layers: dict[int, LayerStats]


class Learner:
    """A group with its optimiser.

    Args:
        group: What is trained.
        config: The run's.
        processes: Who else trains it.
    """

    def __init__(self, group: Group, config: TrainConfig, processes: Processes) -> None:
        self.group, self.config, self._processes = group, config, processes
        self.weights = [p for p in group.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.weights, config)
        self._peak = config.learning_rate(group.part(group.layers[0]).config.d_transcoder)
        shared = config.parallel == "data" and not config.end_to_end
        self._module = processes.prepare(group) if shared else group
        self._shared = shared

    def step(self, batch: Mapping[int, tuple[Tensor, Tensor]], number: int) -> StepStats:
        """Train on one batch of activations.

        Raises:
            TrainingError: The loss or its gradient is not finite.
        """
        batch = {layer: batch[layer] for layer in self.group.layers}
        with self._autocast():
            loss, stats = self._module(batch, sparsity_weight(number, self.config))
        value = self.check(loss, number, "loss")
        self._processes.backward(loss)
        self.update(number)
        n = len(next(iter(batch.values()))[0])
        self._observe(stats, n)
        return StepStats(value, stats)

    def update(self, number: int) -> None:
        """Use the gradients that are there.

        Raises:
            TrainingError: They are not finite.
        """
        self.group.project()
        if self.config.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm)
            self.check(norm, number, "gradient")
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate(number, self.config, self._peak)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.group.constrain()

    def _observe(self, stats: Mapping[int, LayerStats], n: int) -> None:
        for layer, seen in stats.items():
            fired, least = seen.fired, seen.least
            if self._shared:
                fired = self._processes.any_of(fired)
                least = None if least is None else self._processes.mean(least)
            world = self._processes.world if self._shared else 1
            self.group.observe(layer, fired, least, n * world)

    def _autocast(self) -> Any:
        if self.config.autocast is None:
            return nullcontext()
        device = self.weights[0].device.type
        return torch.autocast(device, dtype=getattr(torch, self.config.autocast))

    def check(self, value: Tensor, number: int, what: str) -> float:
        """A loss or a gradient's norm as a number.

        Raises:
            TrainingError: It is not finite.
        """
        number_of = float(value.detach())
        if not math.isfinite(number_of):
            layers = ", ".join(map(str, self.group.layers))
            raise TrainingError(
                f"the {what} of layer(s) {layers} became {number_of} at step {number + 1}: the "
                "last checkpoint is kept; lower lr or sparsity_weight, set clip_norm, or train "
                "with autocast off"
            )
        return number_of

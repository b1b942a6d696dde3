"""Some features of a set as a set: their encoder and decoder rows and nothing else.

An intervention on k features that keeps the rest of the MLP's output needs k rows of each matrix:
``out + (new - old) W_dec_k``. That is 16 kB per feature of a model of width 2048 instead of
gigabytes per layer, which is what makes steering cheap where weights have to travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.layer_sources import Rows
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, dtype_name

#: Activations of which one feature can be known without the others.
ELEMENTWISE = ("relu", "jumprelu", "batchtopk")


class FeatureRows:
    """A ``LayerSource`` of chosen features; biases and skip paths, which cancel out where the
    error is kept, are left out.

    Args:
        transcoders: The set.
        features: Layer -> feature numbers.

    Raises:
        InputError: No feature, one that is not there, or an activation that needs all of them.
    """

    def __init__(self, transcoders: TranscoderSet, features: Mapping[int, Sequence[int]]) -> None:
        if not features or not all(len(numbers) for numbers in features.values()):
            raise InputError("features= names no feature: give {layer: [numbers]}")
        self._set = transcoders
        self.numbers = {layer: _numbers(transcoders, layer, features[layer]) for layer in features}
        if transcoders.cross_layer:
            # Layers that these features only write to take part with one feature, unedited.
            for layer in transcoders.targets(min(features)):
                self.numbers.setdefault(layer, (0,))
        self.configs = {
            layer: transcoders.config(layer).replace(d_transcoder=len(numbers), skip=False)
            for layer, numbers in sorted(self.numbers.items())
        }
        self.provenance: Mapping[str, Any] = transcoders.provenance

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        """The layer's chosen rows as a transcoder."""
        whole, config = self._set.load(layer), self.configs[layer]
        index = torch.tensor(self.numbers[layer], device=whole.W_enc.device)
        threshold = getattr(whole.activation, "threshold", None)
        if threshold is not None:
            threshold = (threshold[index] if threshold.dim() else threshold).detach().clone()
        dtype = dtype_name(whole.W_enc.dtype)
        with torch.device("meta"):
            part = (
                CrossLayerPart(config.replace(dtype=dtype), whole.targets, threshold)
                if isinstance(whole, CrossLayerPart)
                else Transcoder(config.replace(dtype=dtype), threshold)
            )
        state = {name: getattr(whole, name).detach()[index] for name in ("W_enc", "b_enc", "W_dec")}
        state["b_dec"] = torch.zeros_like(whole.b_dec)
        if threshold is not None:
            state["activation.threshold"] = threshold
        part.load_state_dict(state, assign=True)
        return part.requires_grad_(False)

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        """See ``LayerSource``."""
        numbers = torch.tensor(self.numbers[layer])[indices]
        return self._set.rows(layer, numbers, which)


def _numbers(transcoders: TranscoderSet, layer: int, features: Sequence[int]) -> tuple[int, ...]:
    config = transcoders.config(layer)
    if config.activation not in ELEMENTWISE:
        raise InputError(
            f"layer {layer}'s features compete with each other (activation "
            f"{config.activation!r}): whether one is active depends on all, so all have to be "
            "attached; leave features= out"
        )
    numbers = tuple(dict.fromkeys(int(i) for i in features))
    if not 0 <= min(numbers) <= max(numbers) < config.d_transcoder:
        raise InputError(
            f"layer {layer} has features 0 to {config.d_transcoder - 1}, got {list(numbers)}"
        )
    return numbers

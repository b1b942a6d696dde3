"""Which tensors a layer of a decode-clt checkpoint is made of, and how (``decode_clt``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assembled import Build, Piece, scaled, summed

LOG_THRESHOLD = "theta_manager.log_threshold"
_DECODERS = "decoder_module.decoders"


@dataclass(frozen=True)
class Layout:
    """One checkpoint: its file, sizes, config and how its activations were normalised."""

    file: str
    n_layers: int
    width: int
    d_model: int
    raw: Mapping[str, Any]
    normalisation: str

    @property
    def tying(self) -> str:
        """Which decoders are one."""
        return self.raw.get("decoder_tying", "none")

    def decoder(self, source: int, target: int) -> str:
        """The name of the decoder between two layers."""
        key = {"none": f"{source}->{target}", "per_source": source, "per_target": target}
        return f"{_DECODERS}.{key[self.tying]}"


def layer_pieces(layout: Layout, layer: int) -> dict[str, Piece]:
    """Everything that a layer needs, under names that ``builder`` knows."""
    file, width, d_model = layout.file, layout.width, layout.d_model
    encoder = f"encoder_module.encoders.{layer}"
    pieces = {
        "W_enc": Piece(file, f"{encoder}.weight", (width, d_model), features=0),
        "b_enc": Piece(file, f"{encoder}.bias_param", (width,), features=0),
    }
    for target in range(layer, layout.n_layers):
        key = f"{layout.decoder(layer, target)}.weight"
        pieces[f"W_dec.{target}"] = Piece(file, key, (d_model, width), features=1)
    # With one decoder per target layer its bias is added once, else by every source.
    sources = [layer] if layout.tying == "per_target" else range(layer + 1)
    for source in sources:
        key = f"{layout.decoder(source, layer)}.bias_param"
        pieces[f"b_dec.{source}"] = Piece(file, key, (d_model,))
    if layout.raw["activation_fn"] == "jumprelu":
        shape = (layout.n_layers, width)
        pieces["log_threshold"] = Piece(file, LOG_THRESHOLD, shape, layer, features=0)
    if layout.raw.get("skip_connection"):
        key = f"decoder_module.skip_weights.{layer}"
        pieces["W_skip"] = Piece(file, key, (d_model, d_model))
    return pieces


@dataclass(frozen=True)
class Affine:
    """``normalised = (x - mean) / std``, per dimension ``(d,)``."""

    mean: Tensor
    std: Tensor


def affine(
    layout: Layout, layer: int, side: str, statistics: Mapping[str, Any], where: str
) -> Affine:
    """How one side ("inputs" or "targets") of a layer was normalised.

    Raises:
        CheckpointError: Statistics that are missing or are not numbers of the right length.
    """
    zeros, ones = torch.zeros(layout.d_model), torch.ones(layout.d_model)
    if layout.normalisation == "none":
        return Affine(zeros, ones)
    if layout.normalisation == "sqrt_d_model":
        return Affine(zeros, ones / math.sqrt(layout.d_model))
    entry = statistics.get(str(layer))
    values = entry.get(side) if isinstance(entry, dict) else None
    found = [values.get(name) if isinstance(values, dict) else None for name in ("mean", "std")]
    for numbers in found:
        if (
            not isinstance(numbers, list)
            or len(numbers) != layout.d_model
            or not all(isinstance(number, int | float) for number in numbers)
        ):
            raise CheckpointError(
                f"{where}: its norm_stats.json has no {layout.d_model} means and deviations for "
                f"the {side} of layer {layer}"
            )
    mean, std = (torch.tensor(numbers, dtype=torch.float32) for numbers in found)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{where}: its norm_stats.json has deviations that are not positive")
    return Affine(mean, std)


def builder(layout: Layout, layer: int, statistics: Mapping[str, Any], where: str) -> Build:
    """The function that makes a layer's canonical tensors of its pieces."""
    reads = affine(layout, layer, "inputs", statistics, where)
    targets = range(layer, layout.n_layers)
    writes = [affine(layout, target, "targets", statistics, where) for target in targets]

    def build(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own, stored = writes[0], tensors["W_enc"]
        W_enc = scaled(stored, 1 / reads.std)
        b_enc = tensors["b_enc"].float() - W_enc.float() @ reads.mean
        decoders = [
            scaled(tensors[f"W_dec.{target}"].T, after.std)
            for target, after in zip(targets, writes, strict=True)
        ]
        biases = [tensor for name, tensor in tensors.items() if name.startswith("b_dec.")]
        b_dec = summed(biases).float() * own.std + own.mean
        found = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": torch.stack(decoders, dim=1)}
        if "W_skip" in tensors:
            # x_n W.T * std + mean with x_n = (x - mean_in) / std_in
            found["W_skip"] = scaled(tensors["W_skip"], own.std[:, None] / reads.std)
            b_dec = b_dec - found["W_skip"].float() @ reads.mean
        found["b_dec"] = b_dec
        if "log_threshold" in tensors:
            found["threshold"] = tensors["log_threshold"].float().exp()
        return found

    return build

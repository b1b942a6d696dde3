"""Writing sets in circuit-tracer's layout, so that circuit-tracer opens them from a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nnsight_transcoders.errors import ConfigError, InputError
from nnsight_transcoders.hub.circuit_tracer_layers import CONFIG
from nnsight_transcoders.hub.hooks import hook_names
from nnsight_transcoders.hub.staging import canonical_tensors, staged, write_tensors
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import TranscoderConfig

logger = logging.getLogger(__name__)

#: ``model_kind`` in ``config.yaml``: per-layer, cross-layer.
KINDS = ("transcoder_set", "cross_layer_transcoder")


def save_circuit_tracer(transcoders: TranscoderSet, folder: str | Path) -> Path:
    """Write a set in circuit-tracer's layout, one layer in memory at a time.

    A BatchTopK threshold is written as the JumpReLU that it is at inference. circuit-tracer always
    leaves out position 0, whatever the set's ``leading_positions``. A TopK set is written as such,
    with a logged warning: circuit-tracer up to 0.5 has no TopK and reads it as ReLU.

    Args:
        transcoders: A per-layer or cross-layer set that has all layers from 0 on.
        folder: Where to; made if it is not there.

    Returns:
        The folder.

    Raises:
        ConfigError: The set has something that the layout cannot express.
        InputError: Layers are missing, or the folder cannot be written.
    """
    folder = Path(folder)
    layers = transcoders.layers
    if layers != tuple(range(len(layers))):
        raise InputError(
            f"circuit-tracer needs all layers from 0 on; this set has layers {list(layers)}"
        )
    config = _config(transcoders)
    if "k" in config:
        logger.warning(
            "circuit-tracer up to 0.5 does not know TopK: it will read this set as ReLU, with all "
            "features of positive pre-activation active"
        )
    with staged(folder, last=CONFIG) as stage:
        for layer in layers:
            for name, tensors in _layer_files(transcoders, layer).items():
                write_tensors(stage / name, tensors, {})
        (stage / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def _config(transcoders: TranscoderSet) -> dict[str, Any]:
    configs = [transcoders.config(layer) for layer in transcoders.layers]
    first = configs[0]
    for config in configs:
        _check_expressible(config, first, transcoders.cross_layer)
    reads, writes = hook_names(first.input_site, first.output_site)
    found: dict[str, Any] = {
        "model_name": first.base_model,
        "model_kind": KINDS[transcoders.cross_layer],
        "feature_input_hook": reads,
        "feature_output_hook": writes,
    }
    if first.activation == "topk":
        found |= {"activation": "topk", "k": first.k}
    return {key: value for key, value in found.items() if value is not None}


def _check_expressible(
    config: TranscoderConfig, first: TranscoderConfig, cross_layer: bool
) -> None:
    same = ("input_site", "output_site", "activation", "k", "d_transcoder")
    differing = [name for name in same if getattr(config, name) != getattr(first, name)]
    for name in differing:
        raise ConfigError(
            f"circuit-tracer has one {name} for all layers; layer {config.layer} has "
            f"{getattr(config, name)!r}, layer {first.layer} {getattr(first, name)!r}"
        )
    activation = config.activation
    if activation == "grouptopk" or (activation == "topk" and (config.relu_first or cross_layer)):
        detail = " with a ReLU first" if activation == "topk" and config.relu_first else ""
        raise ConfigError(f"circuit-tracer cannot express the activation {activation}{detail}")
    if cross_layer and config.skip:
        raise ConfigError("circuit-tracer cannot express a cross-layer set with skip paths")


def _layer_files(transcoders: TranscoderSet, layer: int) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors of one layer, under circuit-tracer's names."""
    module = transcoders.load(layer)
    tensors = canonical_tensors(module)
    if "threshold" in tensors:
        tensors["threshold"] = _per_feature(tensors["threshold"], module.config)
    if not transcoders.cross_layer:
        if "threshold" in tensors:
            tensors["activation_function.threshold"] = tensors.pop("threshold")
        return {f"layer_{layer}.safetensors": tensors}
    decoder = {f"W_dec_{layer}": tensors.pop("W_dec")}
    encoder = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
    return {f"W_enc_{layer}.safetensors": encoder, f"W_dec_{layer}.safetensors": decoder}


def _per_feature(threshold: Tensor, config: TranscoderConfig) -> Tensor:
    """One threshold per feature; below zero, BatchTopK's ReLU makes it zero."""
    if config.activation == "batchtopk":
        threshold = threshold.clamp(min=0)
    return (
        threshold.detach().expand(config.d_transcoder).clone(memory_format=torch.contiguous_format)
    )

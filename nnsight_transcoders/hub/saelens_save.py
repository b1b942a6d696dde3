"""Writing sets in SAELens' layout, so that ``SAE.load_from_disk`` opens each layer's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from nnsight_transcoders.errors import ConfigError
from nnsight_transcoders.hub.hooks import hook_names
from nnsight_transcoders.hub.staging import canonical_tensors, staged, write_json, write_tensors
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import TranscoderConfig, dtype_name

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: The version of SAELens whose layout this is. Without one, SAELens takes the file for an older
#: layout and drops ``metadata``.
VERSION = "6.0.0"
#: (JumpReLU, skip path) -> SAELens' name of it.
ARCHITECTURES = {
    (False, False): "transcoder",
    (False, True): "skip_transcoder",
    (True, False): "jumprelu_transcoder",
    (True, True): "jumprelu_skip_transcoder",
}


def save_saelens(transcoders: TranscoderSet, folder: str | Path) -> Path:
    """Write a per-layer set in SAELens' layout: ``layer_{i}/{cfg.json,sae_weights.safetensors}``.

    One layer is in memory at a time; a layer's folder takes the place of an older one whole. A
    BatchTopK threshold is written as the JumpReLU that it is at inference.

    Args:
        transcoders: The set.
        folder: Where to; made if it is not there.

    Returns:
        The folder.

    Raises:
        ConfigError: The set has something that the layout cannot express.
        InputError: The folder cannot be written.
    """
    folder = Path(folder)
    for layer in transcoders.layers:
        _check_expressible(transcoders.config(layer))
    for layer in transcoders.layers:
        with staged(folder / f"layer_{layer}", last=CONFIG) as stage:
            config, tensors = _layer(transcoders, layer)
            write_tensors(stage / WEIGHTS, tensors, {})
            write_json(stage / CONFIG, config)
    return folder


def _check_expressible(config: TranscoderConfig) -> None:
    if config.cross_layer:
        raise ConfigError("SAELens has no cross-layer transcoders; save in another layout")
    if config.activation not in ("relu", "jumprelu", "batchtopk"):
        raise ConfigError(
            f"SAELens' transcoders are ReLU or JumpReLU; layer {config.layer} has "
            f"{config.activation}"
        )


def _layer(transcoders: TranscoderSet, layer: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One layer's ``cfg.json`` and tensors."""
    module = transcoders.load(layer)
    tensors, config = canonical_tensors(module), module.config
    tensors["W_enc"] = tensors["W_enc"].T
    dtype = tensors["W_enc"].dtype
    if "threshold" in tensors:
        threshold = tensors["threshold"].to(dtype)
        if config.activation == "batchtopk":
            threshold = threshold.clamp(min=0)  # what its ReLU amounts to
        tensors["threshold"] = threshold.expand(config.d_transcoder).clone()
    reads, writes = hook_names(config.input_site, config.output_site)
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "model_name": config.base_model,
        "hook_name": f"blocks.{layer}.{reads}",
        "hook_name_out": f"blocks.{layer}.{writes}",
        "leading_positions": config.leading_positions,
    }
    return {
        "architecture": ARCHITECTURES["threshold" in tensors, config.skip],
        "d_in": config.d_in,
        "d_sae": config.d_transcoder,
        "d_out": config.d_out,
        "dtype": dtype_name(dtype),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }, tensors

"""Transcoders at the start of training, and their units.

Training happens in units in which inputs have a mean square of 1 per dimension and outputs a
variance of 1 per dimension, so that learning rates, thresholds and penalties mean the same at every
layer. The scales are folded into the weights when they leave training: exactly, for every
activation, since activations keep their training units.

Starts (Gao et al. 2024; Belrose et al., sparsify): ``b_dec`` is the mean output, encoder rows are
random directions of norm 1, the encoder bias centres the pre-activations, decoder rows are zero,
random, or the encoder's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, TranscoderConfig, dtype_name

from .config import TrainConfig

Part = Transcoder | CrossLayerPart
#: Longest sample that scales and means are taken from.
SAMPLE = 16_384


@dataclass(frozen=True)
class Units:
    """Factors from the model's units to those of training, per layer.

    Attributes:
        inputs: Of the input site.
        outputs: Of the output site.
    """

    inputs: Mapping[int, float]
    outputs: Mapping[int, float]


def measure_units(sample: Mapping[int, tuple[Tensor, Tensor]]) -> Units:
    """Units from activations ``(n, d)`` of each layer."""
    inputs, outputs = {}, {}
    for layer, (x, y) in sample.items():
        x, y = x[:SAMPLE].double(), y[:SAMPLE].double()
        inputs[layer] = _inverse(x.square().mean())
        outputs[layer] = _inverse((y - y.mean(0)).square().mean())
        if y is x or x.data_ptr() == y.data_ptr():  # one site, one unit
            inputs[layer] = outputs[layer]
    return Units(inputs, outputs)


def _inverse(mean_square: Tensor) -> float:
    value = float(mean_square)
    return 1 / math.sqrt(value) if value > 0 else 1.0


def transcoder_config(
    config: TrainConfig, layer: int, d_model: int, base_model: str | None
) -> TranscoderConfig:
    """What a layer's transcoder will be.

    Raises:
        ConfigError: k or n_groups does not fit the width.
    """
    width = config.d_transcoder or 16 * d_model
    fixed = config.activation in ("topk", "grouptopk", "batchtopk")
    return TranscoderConfig(
        d_in=d_model,
        d_out=d_model,
        d_transcoder=width,
        layer=layer,
        activation=config.activation,
        k=config.k if fixed else None,
        n_groups=config.n_groups if config.activation == "grouptopk" else None,
        input_site=config.input_site,
        output_site=config.output_site,  # type: ignore[arg-type]
        skip=config.skip,
        cross_layer=config.cross_layer,
        leading_positions=config.leading_positions,
        base_model=base_model,
    )


def make_part(shape: TranscoderConfig, layers: tuple[int, ...], threshold: float) -> Part:
    """An untrained transcoder, all zero; ``layers``: all layers of a cross-layer one."""
    start = None
    if shape.activation == "jumprelu":
        start = torch.full((shape.d_transcoder,), threshold)
    if not shape.cross_layer:
        return Transcoder(shape, start)
    return CrossLayerPart(shape, tuple(n for n in layers if n >= shape.layer), start)


@torch.no_grad()
def initialise(
    part: Part, config: TrainConfig, x: Tensor, y: Tensor, generator: torch.Generator
) -> None:
    """Give a transcoder its starting weights.

    Args:
        part: All zero.
        config: Says how.
        x: Input-site values ``(n, d_in)`` in training units.
        y: Output-site values ``(n, d_out)``.
        generator: On the CPU, so that the start does not depend on the device.
    """
    rows = nn.functional.normalize(torch.randn(part.W_enc.shape, generator=generator), dim=1)
    part.W_enc.copy_(rows)
    part.b_enc.copy_(-(part.W_enc @ x[:SAMPLE].float().mean(0)))
    part.b_dec.copy_(y[:SAMPLE].float().mean(0))
    if config.start == "tied":
        part.W_dec.copy_(rows)
    elif config.start == "random":
        table = torch.randn(part.W_dec.shape, generator=generator)
        part.W_dec.copy_(table / table.flatten(1).norm(dim=1).view(-1, *[1] * (table.dim() - 1)))


@torch.no_grad()
def exported(part: Part, units: Units, dtype: torch.dtype) -> Part:
    """A copy in the model's units: what is saved and attached."""
    layer = part.config.layer
    factor_in, factor_out = units.inputs[layer], units.outputs[layer]
    # Copies also of what no factor changes: training goes on with the original.
    weights = {name: w.detach().float().cpu().clone() for name, w in part.state_dict().items()}
    weights["W_enc"] = weights["W_enc"] * factor_in
    weights["b_dec"] = weights["b_dec"] / factor_out
    if isinstance(part, CrossLayerPart):
        factors = torch.tensor([units.outputs[target] for target in part.targets])
        weights["W_dec"] = weights["W_dec"] / factors[:, None]
    else:
        weights["W_dec"] = weights["W_dec"] / factor_out
    if part.W_skip is not None:
        weights["W_skip"] = weights["W_skip"] * (factor_in / factor_out)
    return _with_weights(part, weights, dtype)


@torch.no_grad()
def imported(part: Part, units: Units) -> Part:
    """The reverse of ``exported``, in float32: a finished transcoder that is trained further."""
    back = Units(
        {n: 1 / f for n, f in units.inputs.items()}, {n: 1 / f for n, f in units.outputs.items()}
    )
    return exported(part, back, torch.float32)


def _with_weights(part: Part, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Part:
    config = part.config.replace(dtype=dtype_name(dtype))
    threshold = weights.get("activation.threshold")
    with torch.device("meta"):
        if isinstance(part, CrossLayerPart):
            copy: Part = CrossLayerPart(config, part.targets, threshold)
        else:
            copy = Transcoder(config, threshold)
    copy.load_state_dict({n: w.to(dtype) for n, w in weights.items()}, assign=True)
    return copy.requires_grad_(False)

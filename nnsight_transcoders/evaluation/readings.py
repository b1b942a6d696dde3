"""Ways to read a transcoder, and what each makes of the values at a layer's sites (torch only).

A *reading* says where a transcoder reads and writes and what is done to its input, its weights and
its output. The one that its config gives is the default; the others are the mistakes that a
checkpoint can be opened with. ``hypotheses.py`` tries them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nnsight_transcoders.activations import keep_joint
from nnsight_transcoders.transcoder import CrossLayerPart, InputSite, OutputSite, Transcoder

#: One layer's transcoder, or all parts of a cross-layer one, which need each other.
Modules = Mapping[int, Transcoder | CrossLayerPart]


@dataclass(frozen=True)
class SiteValues:
    """One layer's values at all sites on a text, ``(n, d_model)`` each, at the same positions.

    Attributes:
        inputs: The input sites that the layer has, by name.
        outputs: The output sites, by name.
        gain: The gain ``(d_model,)`` of the norm before the MLP, if there is one.
        first: ``(n,)`` which positions are the first of their text.
    """

    inputs: Mapping[InputSite, Tensor]
    outputs: Mapping[OutputSite, Tensor]
    gain: Tensor | None
    first: Tensor

    def at(self, site: InputSite) -> Tensor:
        """The values at a site that is read: an output site, if it is an autoencoder's."""
        return self.inputs[site] if site in self.inputs else self.outputs[site]  # type: ignore[index]

    def every(self, step: int) -> SiteValues:
        """Every ``step``-th position."""
        return SiteValues(
            {site: x[::step] for site, x in self.inputs.items()},
            {site: y[::step] for site, y in self.outputs.items()},
            self.gain,
            self.first[::step],
        )


@dataclass(frozen=True)
class Reading:
    """One way to read a set. The defaults are the way it is read anyway.

    Attributes:
        input_site: Where it reads; None: where its config says.
        output_site: Where it writes; None: where its config says.
        gain: The input is multiplied by the norm's gain to this power.
        centred: Whether the input's mean over d_model is subtracted.
        shift: How many times ``b_dec`` is added to the input.
        transposed: Which weight is transposed.
        writes_bias: Whether ``b_dec`` is added at the output.
        skips_first: Whether first positions are left out.
        normalised: Whether inputs are scaled to a mean norm of sqrt(d_model), as datasets are.
        scale_in: Factor of the input.
        scale_out: Factor of the output; None: the one that fits best.
    """

    input_site: InputSite | None = None
    output_site: OutputSite | None = None
    gain: int = 0
    centred: bool = False
    shift: int = 0
    transposed: str | None = None
    writes_bias: bool = True
    skips_first: bool = False
    normalised: bool = False
    scale_in: float = 1.0
    scale_out: float | None = 1.0


@torch.no_grad()
def reconstruct(
    modules: Modules, values: Mapping[int, SiteValues], reading: Reading
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer, the reconstruction under a reading (before ``scale_out``) and what it should be.

    Args:
        modules: One layer's transcoder, or all parts of a cross-layer one.
        values: The values at these layers.
        reading: How they are read.
    """
    read = {layer: _altered(module, reading) for layer, module in modules.items()}
    inputs = {n: _input(modules[n], values[n], reading).to(m.W_enc) for n, m in read.items()}
    features = {n: module.encode(inputs[n]) for n, module in read.items()}
    joint_k = next(iter(read.values())).config.joint_k
    if joint_k is not None:
        norms = {n: module.decoder_norms() for n, module in read.items()}
        features = keep_joint(features, norms, joint_k)
    made: dict[int, Tensor] = {}
    for layer, module in read.items():
        x, acts = inputs[layer], features[layer]
        if isinstance(module, Transcoder):
            made[layer] = module.decode(acts, x)
            continue
        made[layer] = made.get(layer, 0) + module.b_dec + module.skip(x)
        for target in module.targets:
            made[target] = made.get(target, 0) + module.contribution(acts, target)
    found = {}
    for layer, module in modules.items():
        here, out = values[layer], made[layer]
        wanted = here.outputs[reading.output_site or module.config.output_site].to(out.device)
        if reading.skips_first:
            kept = ~here.first.to(out.device)
            out, wanted = out[kept], wanted[kept]
        found[layer] = out, wanted
    return found


def measure(made: Tensor, wanted: Tensor, reading: Reading) -> tuple[Reading, float]:
    """The reading with its output factor filled in, and the variance it leaves unexplained."""
    made, wanted = made.double(), wanted.double()
    factor = reading.scale_out
    if factor is None:
        factor = float((made * wanted).sum() / made.pow(2).sum().clamp_min(1e-300))
    error = (wanted - factor * made).pow(2).sum()
    fvu = float(error / (wanted - wanted.mean(0)).pow(2).sum())
    return replace(reading, scale_out=factor), fvu if fvu == fvu else float("inf")


def _input(module: Transcoder | CrossLayerPart, here: SiteValues, reading: Reading) -> Tensor:
    x = here.at(reading.input_site or module.config.input_site)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if reading.gain and here.gain is not None:
        x = x * here.gain.to(x) ** reading.gain
    if reading.centred:
        x = x - x.mean(-1, keepdim=True)
    if reading.shift:
        x = x + reading.shift * module.b_dec.to(x)
    if reading.normalised:
        x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1).mean())
    return x * reading.scale_in


def _altered(module: Transcoder | CrossLayerPart, reading: Reading) -> Transcoder | CrossLayerPart:
    """The module itself, or a shallow copy with other weights."""
    changed = {}
    if reading.transposed is not None:
        weight = module.get_parameter(reading.transposed).detach()
        changed[reading.transposed] = weight.transpose(0, -1).contiguous()
    if not reading.writes_bias:
        changed["b_dec"] = torch.zeros_like(module.b_dec)
    if not changed:
        return module
    altered = copy.copy(module)
    parameters = {name: nn.Parameter(w, requires_grad=False) for name, w in changed.items()}
    altered._parameters = {**module._parameters, **parameters}
    return altered


def describe(reading: Reading, module: Transcoder | CrossLayerPart) -> str:
    """What a reading changes, in words."""
    config, parts = module.config, []
    if reading.input_site is not None:
        parts.append(f"input site {reading.input_site} instead of {config.input_site}")
    if reading.output_site is not None:
        parts.append(f"output site {reading.output_site} instead of {config.output_site}")
    if reading.transposed is not None:
        parts.append(f"{reading.transposed} transposed")
    if reading.shift:
        parts.append(f"b_dec {'not ' if reading.shift > 0 else ''}subtracted from the input")
    if not reading.writes_bias:
        parts.append("b_dec not added to the output")
    if reading.gain:
        verb = "multiplied" if reading.gain > 0 else "divided"
        parts.append(f"input {verb} by the norm's gain")
    if reading.centred:
        parts.append("input with its mean over d_model subtracted")
    if reading.skips_first:
        parts.append("first position left out (leading_positions=1)")
    if reading.normalised:
        parts.append("input scaled to a mean norm of sqrt(d_model)")
    if reading.scale_in != 1:
        parts.append(f"input scaled by {reading.scale_in:.3g}")
    if reading.scale_out not in (1, None):
        parts.append(f"output scaled by {reading.scale_out:.3g}")
    return " and ".join(parts) or "as it is"

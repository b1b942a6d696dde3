"""Why does a transcoder not fit? Neighbouring hypotheses, tried on the values it failed on.

A set that reconstructs nothing has mostly been read with one thing wrong: it belongs at another
site, a matrix is transposed, ``b_dec`` is (or is not) subtracted from the input, a norm's gain is
folded into the encoder, inputs and outputs were scaled, or the first position was left out in
training. Each of these is tried alone, both sites together, and, where none fits, each together
with each other site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nnsight_transcoders.transcoder import CrossLayerPart, InputSite, OutputSite, Transcoder

from .readings import Modules, Reading, SiteValues, describe, measure, reconstruct

#: What is said where no hypothesis fits.
NONE_FITS = (
    "none of the neighbouring hypotheses fits: the set belongs to another model, or was trained on "
    "normalised values"
)
#: Input scales tried at first; finer ones follow around the best, each time by these steps.
SCALES = tuple(2.0**n for n in range(-10, 11))
FINER = (1 / 8, 1 / 64)
#: Rows on which the input scale is looked for.
SCALE_ROWS = 64


@dataclass(frozen=True)
class Hypothesis:
    """A reading of one layer that was tried.

    Attributes:
        reading: What was changed.
        text: The same in words.
        fvu: Fraction of variance that it leaves unexplained.
    """

    reading: Reading
    text: str
    fvu: float

    def __str__(self) -> str:
        return f"{self.text} (FVU {self.fvu:.2f})"


Found = dict[int, list[Hypothesis]]


def rank_hypotheses(modules: Modules, values: Mapping[int, SiteValues], good: float) -> Found:
    """Try neighbouring readings of transcoders that do not fit.

    Args:
        modules: One layer's transcoder, or all parts of a cross-layer one: a change is made to all
            of them, since each layer's output needs the layers below.
        values: The values at these layers.
        good: The FVU below which a hypothesis fits. Factors, which have to be searched for, are
            tried where none reaches a quarter of it, and pairs where none fits alone.

    Returns:
        Per layer, the hypotheses, best first. Of those that do about as well as the best, the
        simplest comes first.
    """
    singles = single_readings(modules, values)
    found = _try(modules, values, singles)
    _extend(found, _try(modules, values, _site_pairs(singles)))
    if _worst(found) >= good / 4:
        _extend(found, _scaled(modules, values))
    if _worst(found) >= good:
        _extend(found, _try(modules, values, _pairs(singles)))
    return {layer: _ranked(tried) for layer, tried in found.items()}


def explain(ranked: Sequence[Hypothesis], good: float) -> str | None:
    """The best hypothesis in words, or None if it leaves ``good`` or more unexplained."""
    return str(ranked[0]) if ranked and ranked[0].fvu < good else None


def _ranked(tried: Sequence[Hypothesis]) -> list[Hypothesis]:
    best = min(h.fvu for h in tried)
    simplest = next(h for h in tried if h.fvu <= 1.1 * best + 0.002)
    return [simplest, *sorted((h for h in tried if h is not simplest), key=lambda h: h.fvu)]


# -- which readings ------------------------------------------------------------------------------


def single_readings(modules: Modules, values: Mapping[int, SiteValues]) -> list[Reading]:
    """All readings that change one thing without a scale, the likeliest first."""
    layer, module = next(iter(modules.items()))
    config, here = module.config, values[layer]
    x, y = here.at(config.input_site), here.outputs[config.output_site]
    inputs: list[InputSite] = [s for s, v in here.inputs.items() if not torch.equal(v, x)]
    outputs: list[OutputSite] = [s for s, v in here.outputs.items() if not torch.equal(v, y)]
    found = [Reading(input_site=site) for site in inputs]
    found += [Reading(output_site=site) for site in outputs]
    found += [Reading(transposed=name) for name in _square(module)]
    if module.b_dec.any():
        if config.d_in == config.d_out:
            found += [Reading(shift=-1), Reading(shift=1)]
        found.append(Reading(writes_bias=False))
    if here.gain is not None:
        found += [Reading(gain=1), Reading(gain=-1)]
    if x.float().mean(-1).abs().mean() > 1e-4 * x.float().abs().mean():
        found.append(Reading(centred=True))
    if here.first.any() and not here.first.all():
        found.append(Reading(skips_first=True))
    return found


def _site_pairs(singles: Sequence[Reading]) -> list[Reading]:
    """Both sites are others."""
    return [
        replace(reads, output_site=writes.output_site)
        for reads in singles
        for writes in singles
        if reads.input_site is not None and writes.output_site is not None
    ]


def _pairs(singles: Sequence[Reading]) -> list[Reading]:
    """Every other site together with every change of something that is no site."""
    reads = [r for r in singles if r.input_site is not None]
    writes = [r for r in singles if r.output_site is not None]
    others = [r for r in singles if r not in reads and r not in writes and not r.gain]
    others += [Reading(scale_out=None), Reading(normalised=True, scale_out=None)]
    found = [replace(other, input_site=r.input_site) for r in reads for other in others]
    return found + [replace(other, output_site=w.output_site) for w in writes for other in others]


def _square(module: Transcoder | CrossLayerPart) -> list[str]:
    weights = {"W_enc": module.W_enc, "W_dec": module.W_dec, "W_skip": module.W_skip}
    return [
        name
        for name, weight in weights.items()
        if weight is not None and weight.shape[0] == weight.shape[-1]
    ]


# -- what they give ------------------------------------------------------------------------------


def _try(modules: Modules, values: Mapping[int, SiteValues], readings: Iterable[Reading]) -> Found:
    found: Found = {layer: [] for layer in modules}
    for reading in readings:
        for layer, (made, wanted) in reconstruct(modules, values, reading).items():
            fitted, fvu = measure(made, wanted, reading)
            found[layer].append(Hypothesis(fitted, describe(fitted, modules[layer]), fvu))
    return found


def _extend(found: Found, more: Found) -> None:
    for layer, tried in more.items():
        found[layer] += tried


def _worst(found: Found) -> float:
    """The FVU of the layer whose best hypothesis explains least."""
    return max(min((h.fvu for h in tried), default=float("inf")) for tried in found.values())


def _scaled(modules: Modules, values: Mapping[int, SiteValues]) -> Found:
    """Scaled inputs and outputs, by a dataset's own norm and by the factors that fit best."""
    step = max(1, min(len(here.first) for here in values.values()) // SCALE_ROWS)
    few = {layer: here.every(step) for layer, here in values.items()}
    alone, both = (_best_scale(modules, few, scale_out) for scale_out in (1.0, None))
    readings = [
        Reading(scale_out=None),
        Reading(normalised=True),
        Reading(scale_in=alone),
        Reading(normalised=True, scale_out=None),
        Reading(scale_in=both, scale_out=None),
    ]
    return _try(modules, values, readings)


def _best_scale(
    modules: Modules, values: Mapping[int, SiteValues], scale_out: float | None
) -> float:
    """The input factor with the least FVU, added up over the layers."""
    scales, best = SCALES, 1.0
    for step in (*FINER, None):
        tried = [Reading(scale_in=scale, scale_out=scale_out) for scale in scales]
        layers = _try(modules, values, tried).values()
        totals = [sum(h.fvu for h in same) for same in zip(*layers, strict=True)]
        best = scales[min(range(len(scales)), key=totals.__getitem__)]
        if step is not None:
            scales = tuple(best * 2.0 ** (n * step) for n in range(-8, 9))
    return best

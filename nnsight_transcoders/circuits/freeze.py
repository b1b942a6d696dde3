"""From a run and the model's weights to the frozen linear model, each part checked by numbers.

What ``sites.py`` concluded from names and shapes is confirmed here on the run's own values: each
norm must reproduce itself, attention's pattern, values and output must give what attention gave,
and the residual stream must be the sum of its parts. What does not agree raises a ``SiteError``
that names the part, so that a wrong reading of an architecture can never pass as a strange circuit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from nnsight_transcoders.blocks import LayerSites
from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.norms import TOLERANCE, relative_difference
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .attention_weights import fit_attention, other_layouts
from .collect import Run
from .linear import FrozenAttention, FrozenLayer, FrozenModel, FrozenNorm
from .model_weights import ModelWeights, weights_of


def attribution_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Attributions are computed in float32, in float64 for a float64 model."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class MlpSide:
    """How a layer's transcoder hangs on the residual stream.

    Attributes:
        site: Its input site; ``"R"`` where there is no transcoder.
        read: The norm between the residual stream and the input site, if any.
        write: The norm between the output site and the residual stream, if any.
        skip: ``W_skip (D, D)`` or None.
    """

    site: str
    read: FrozenNorm | None
    write: FrozenNorm | None
    skip: Tensor | None


def freeze_norms(module: nn.Module | ModelWeights, sites: Sites, run: Run) -> dict[str, FrozenNorm]:
    """Every norm on the residual path at the run's denominators, by module path.

    Raises:
        SiteError: One of them is neither a LayerNorm nor an RMSNorm, or the MLP does not read what
            the norm before it makes of its residual input.
    """
    norms: dict[str, FrozenNorm] = {}
    dtype = attribution_dtype(run.final.dtype)
    for number, layer in enumerate(sites.layers):
        for path, x in (
            (layer.attention_norm, run.resid[number]),
            (layer.attention_post_norm, run.attended[number]),
            (layer.mlp_norm, run.mid[number]),
            (layer.mlp_post_norm, run.mlp_out[number]),
        ):
            if path is not None and path not in norms:
                norms[path] = freeze_norm(module, path, x)
        if layer.mlp_norm is not None:
            found = norms[layer.mlp_norm].forward(run.mid[number].to(dtype))
            what = f"the input of {layer.mlp_in}"
            _require(found, run.mlp_in[number], TOLERANCE[run.final.dtype], what, layer.mlp_norm)
    norms[sites.final_norm] = freeze_norm(module, sites.final_norm, run.final)
    return norms


def mlp_sides(
    sites: Sites, run: Run, norms: Mapping[str, FrozenNorm], transcoders: TranscoderSet
) -> list[MlpSide]:
    """Per layer, how its transcoder reads and writes.

    Raises:
        SiteError: A transcoder reads site N0 where the block has no norm before its MLP.
    """
    dtype = attribution_dtype(run.final.dtype)
    sides = []
    for number, layer in enumerate(sites.layers):
        if number not in transcoders:
            sides.append(MlpSide("R", None, None, None))
            continue
        config = transcoders.config(number)
        read = norms[layer.mlp_norm] if layer.mlp_norm and config.input_site != "R" else None
        if config.input_site == "N0":
            if read is None:
                raise SiteError(
                    f"layer {number}'s transcoder reads site N0, but {layer.block} has no norm "
                    "before its MLP"
                )
            read = replace(read, gain=torch.ones_like(read.gain), bias=None)
        post = layer.mlp_post_norm if config.output_site == "O" else None
        skip = transcoders.load(number).W_skip if config.skip else None
        sides.append(
            MlpSide(
                config.input_site,
                read,
                norms[post] if post else None,
                None if skip is None else skip.detach().to(run.final.device, dtype, copy=True),
            )
        )
    return sides


def input_values(run: Run, sides: Sequence[MlpSide]) -> list[Tensor]:
    """Per layer, the value at the transcoder's input site ``(T, D)``; N0 has no module of its own,
    so it is computed from the frozen norm."""
    dtype = attribution_dtype(run.final.dtype)
    values = []
    for number, side in enumerate(sides):
        if side.site == "N0":
            assert side.read is not None
            values.append(side.read.forward(run.mid[number].to(dtype)))
        else:
            values.append((run.mid if side.site == "R" else run.mlp_in)[number].to(dtype))
    return values


def freeze(
    module: nn.Module | ModelWeights,
    sites: Sites,
    run: Run,
    norms: Mapping[str, FrozenNorm],
    sides: Sequence[MlpSide],
    *,
    maps: bool = True,
) -> FrozenModel:
    """The frozen linear model of a run.

    Args:
        module: The Hugging Face module the run came from, or where else its weights are.
        sites: Its sites.
        run: What ``collect`` kept.
        norms: From ``freeze_norms``.
        sides: From ``mlp_sides``.
        maps: Whether attention has its value and output maps; else they are shapes without
            content (on the meta device), and what needs them is asked of a server.

    Raises:
        SiteError: A part does not reproduce the run.
    """
    weights = weights_of(module)
    layers = []
    for number, (layer, side) in enumerate(zip(sites.layers, sides, strict=True)):
        norm = norms[layer.attention_norm] if layer.attention_norm else None
        layers.append(
            FrozenLayer(
                attention=(
                    frozen_attention(weights, sites, number, run, norm)
                    if maps
                    else _without_maps(sites, number, run)
                ),
                attention_norm=norm,
                attention_post_norm=(
                    norms[layer.attention_post_norm] if layer.attention_post_norm else None
                ),
                read=side.read,
                write=side.write,
                skip=side.skip,
            )
        )
    frozen = FrozenModel(tuple(layers), norms[sites.final_norm], sites.parallel)
    check_residual(sites, run, norms)
    return frozen


def freeze_norm(module: nn.Module | ModelWeights, path: str, x: Tensor) -> FrozenNorm:
    """A norm at the denominators of its input ``x (T, D)``.

    Raises:
        SiteError: It is neither a LayerNorm nor an RMSNorm.
    """
    spec = weights_of(module).norm(path, x)
    scale = spec.scale(x.to(attribution_dtype(x.dtype)))
    return FrozenNorm(spec.gain, spec.bias, scale, spec.centred)


def frozen_attention(
    weights: ModelWeights, sites: Sites, number: int, run: Run, norm: FrozenNorm | None
) -> FrozenAttention:
    """A layer's attention at the pattern of a run, behind its norm.

    Raises:
        SiteError: It is not pattern x values x output.
    """
    layer = sites.layers[number]
    dtype, limit = attribution_dtype(run.final.dtype), TOLERANCE[run.final.dtype]
    if layer.value is None:
        raise no_values(layer)
    x = run.resid[number].to(dtype)
    attention, difference = fit_attention(
        run.pattern[number],
        weights.linear(layer.value, sites.d_model, run.final.dtype),
        weights.linear(layer.out_proj, sites.n_heads * sites.head_dim, run.final.dtype),
        (sites.n_value_heads, sites.head_dim),
        other_layouts(layer.value_layout),
        x if norm is None else norm.forward(x),
        run.attended[number].to(dtype),
    )
    if not difference <= limit:
        raise not_explained(layer, difference)
    return attention


def _without_maps(sites: Sites, number: int, run: Run) -> FrozenAttention:
    if sites.layers[number].value is None:
        raise no_values(sites.layers[number])
    width = sites.head_dim
    value = torch.empty(sites.n_value_heads * width, sites.d_model, device="meta")
    out = torch.empty(sites.d_model, sites.n_heads * width, device="meta")
    return FrozenAttention(run.pattern[number], value, None, out, None)


def no_values(layer: LayerSites) -> SiteError:
    """The error of an attention whose values no one module makes."""
    return SiteError(
        f"{layer.attention} has no module that makes the values: its attention cannot be "
        "written as pattern x values x output; use method='autograd'"
    )


def not_explained(layer: LayerSites, difference: float) -> SiteError:
    """The error of an attention that pattern, values and output do not reproduce."""
    return SiteError(
        f"{layer.attention} cannot be written as pattern x values x output: its output differs by "
        f"{difference:.1e} (relative). Pass value=, value_layout= or out_proj= to resolve_sites, "
        "or use method='autograd'"
    )


def check_residual(sites: Sites, run: Run, norms: Mapping[str, FrozenNorm]) -> None:
    """Check that the residual stream is the sum of the parts that ``sites`` says it is the sum of.

    Raises:
        SiteError: It is not.
    """
    dtype, limit = attribution_dtype(run.final.dtype), TOLERANCE[run.final.dtype]
    if run.position_embedding is not None:
        start = run.embedding.to(dtype) + run.position_embedding.to(dtype)
        _require(start, run.resid[0], limit, f"the input of {sites.layers[0].block}", "embeddings")
    for number, (here, after) in enumerate(pairwise([*run.resid, run.final])):
        layer = sites.layers[number]
        attended = run.attended[number].to(dtype)
        if layer.attention_post_norm is not None:
            attended = norms[layer.attention_post_norm].forward(attended)
        mid = here.to(dtype) + attended
        if not sites.parallel:
            what = f"the MLP's residual input in {layer.block}"
            _require(mid, run.mid[number], limit, what, "block input + attention")
        total = mid + run.mlp_post[number].to(dtype)
        what = f"the output of {layer.block}"
        _require(total, after, limit, what, "block input + attention + MLP")


def _require(found: Tensor, expected: Tensor, limit: float, what: str, parts: str) -> None:
    difference = relative_difference(found, expected.to(found.dtype))
    if difference > limit:
        raise SiteError(
            f"{what} is not {parts} (relative difference {difference:.1e}). The sites do not fit "
            "this architecture: pass parallel= or the norms' paths to resolve_sites"
        )


def logit_directions(
    module: nn.Module | ModelWeights, sites: Sites, tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Demeaned logit directions ``W_U[v] - mean_v W_U`` of some tokens, and their biases.

    Returns:
        ``(n, D)`` directions after the final norm, and ``(n,)`` the unembedding's biases minus
        their mean (zero where it has none).
    """
    weight, bias = weights_of(module).linear(sites.unembed, sites.d_model, dtype)
    rows = weight[tokens] - weight.mean(0)
    if bias is None:
        return rows, torch.zeros(len(tokens), dtype=dtype, device=rows.device)
    return rows, bias[tokens] - bias.mean()

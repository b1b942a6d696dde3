"""Does this package work on my model? The identities of circuit tracing, run on any architecture.

``check(model)`` finds the model's sites, makes random transcoders of each kind at the scale of the
model's own values, and measures what must hold exactly: the frozen replay gives back the run, the
reconstruction plus its error changes nothing, every node's inputs add up, and the explicit operator
agrees with autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .attachment.edit import attached
from .circuits.attribution import attribute
from .circuits.collect import Run, collect
from .circuits.engine import OperatorEngine
from .errors import InputError, SiteError
from .models import hf_module
from .sets import TranscoderSet
from .sites import Sites, resolve_sites
from .transcoder import CrossLayerPart, Transcoder, TranscoderConfig, dtype_name

logger = logging.getLogger(__name__)

Kind = Literal["per-layer", "skip", "cross-layer"]

#: Largest relative error that passes, by the model's dtype. In half precision the residual stream
#: itself is rounded at every addition, which no linear model reproduces: there the check is coarse.
LIMITS = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 3e-1,
}

#: Features of all layers and positions together, about half of which are active.
MAX_FEATURES = 4096


@dataclass(frozen=True)
class CheckRow:
    """One identity that was measured.

    Attributes:
        name: What must hold.
        value: The relative error found; None where it could not be measured.
        limit: Up to where it passes.
        note: Anything to say about it.
    """

    name: str
    value: float | None
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.value is not None and self.value <= self.limit


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found.

    Attributes:
        model: The model's class.
        sites: Where its parts are.
        rows: The identities.
    """

    model: str
    sites: Sites
    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """Whether all of them hold."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        return {"model": self.model, "ok": self.ok, "sites": asdict(self.sites), "rows": rows}


def check(
    model: Any,
    *,
    kinds: Sequence[Kind] = get_args(Kind),
    n_tokens: int = 8,
    sites: Sites | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> CheckReport:
    """Measure the identities of circuit tracing on a model with random transcoders.

    Args:
        model: An nnsight model.
        kinds: Which kinds of transcoder to try.
        n_tokens: Length of the random prompt.
        sites: The model's sites, where they have to be given by hand.
        seed: For the prompt and the transcoders.
        verbose: Show progress.

    Raises:
        SiteError: The model's parts were not found.
    """
    module = hf_module(model)
    sites = sites or resolve_sites(module)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, sites.vocab_size, (n_tokens,), generator=generator)
    run = collect(model, sites, ids)
    limit = LIMITS[run.final.dtype]
    # Few enough that every active feature is a node, in the same order whatever the method.
    width = min(64, max(8, MAX_FEATURES // (sites.n_layers * n_tokens)))
    rows = []
    for kind in tqdm(kinds, desc="check", disable=not verbose, leave=False):
        transcoders = random_transcoders(run, kind, d_transcoder=width, seed=seed)
        rows += _check_kind(model, sites, run, transcoders, kind, limit)
    return CheckReport(type(module).__name__, sites, tuple(rows))


def _check_kind(
    model: Any, sites: Sites, run: Run, transcoders: TranscoderSet, kind: Kind, limit: float
) -> list[CheckRow]:
    ids = run.token_ids
    with attached(model, transcoders, mode="replace+error", sites=sites) as replaced:
        error = logits_difference(model, replaced, ids)
    rows = [CheckRow(f"{kind}: reconstruction + error leaves the logits", error, limit)]
    oracle = attribute(model, transcoders, ids, method="autograd", sites=sites)
    try:
        engine = OperatorEngine(hf_module(model), sites, run, transcoders)
    except SiteError as refusal:
        note = f"autograd is used: {refusal}"
        value = oracle.completeness_error
        return [*rows, CheckRow(f"{kind}: every node's inputs add up", value, limit, note)]
    if kind == "per-layer":
        rows.append(CheckRow("frozen replay gives back the run", _replay_error(engine, run), limit))
    graph = attribute(model, transcoders, ids, method="operator", sites=sites)
    rows.append(CheckRow(f"{kind}: every node's inputs add up", graph.completeness_error, limit))
    difference = (graph.adjacency() - oracle.adjacency()).abs().max()
    relative = float(difference / oracle.weight.abs().max())
    rows.append(CheckRow(f"{kind}: operator agrees with autograd", relative, limit))
    return rows


def logits_difference(model: Any, replaced: Any, ids: Tensor) -> float:
    """Largest difference of the logits of two nnsight models, relative to the largest logit."""
    with torch.no_grad():
        with model.trace(ids[None]):
            expected = model.output.logits.detach().save()
        with replaced.trace(ids[None]):
            found = replaced.output.logits.detach().save()
    return float((found - expected).abs().max() / expected.abs().max())


def _replay_error(engine: OperatorEngine, run: Run) -> float:
    """How far the frozen model, given the run's own outputs, is from the run."""
    outputs = []
    for number, layer in enumerate(engine.frozen.layers):
        site = run.mlp_out if layer.write is not None else run.mlp_post
        outputs.append(site[number].to(engine.dtype))
    replay = engine.frozen.replay(run.resid[0].to(engine.dtype), outputs, constants=True)
    found = torch.stack([*replay.reads, replay.final])
    expected = torch.stack([*engine.inputs, engine.final])
    return float((found - expected).abs().max() / expected.abs().max())


def random_transcoders(
    run: Run,
    kind: Kind,
    *,
    d_transcoder: int = 64,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> TranscoderSet:
    """Random transcoders for a model, at the scale of a run's own values.

    Encoders make pre-activations of about unit size, decoders and skip paths write about as much as
    the MLP does; so numbers stay in the range that real transcoders keep them in.

    Args:
        run: A run of the model, for the scales.
        kind: Which kind.
        d_transcoder: Features per layer.
        seed: For the weights.
        dtype: Of the weights (default: the run's, at least float32).
        **config: Fields of ``TranscoderConfig`` (activation, sites, ...).
    """
    if kind not in get_args(Kind):
        raise InputError(f"unknown kind {kind!r}; known: {', '.join(get_args(Kind))}")
    if dtype is None:
        dtype = torch.float64 if run.final.dtype == torch.float64 else torch.float32
    n_layers, d_model = len(run.resid), run.final.shape[1]
    generator = torch.Generator().manual_seed(seed)
    modules: dict[int, Transcoder | CrossLayerPart] = {}
    for layer in range(n_layers):
        options = TranscoderConfig(
            d_in=d_model,
            d_out=d_model,
            d_transcoder=d_transcoder,
            layer=layer,
            skip=kind == "skip",
            dtype=dtype_name(dtype),
            **config,
        )
        threshold = torch.full((d_transcoder,), 0.3, dtype=dtype)
        given = threshold if options.activation in ("jumprelu", "batchtopk") else None
        if kind == "cross-layer":
            module = CrossLayerPart(options, tuple(range(layer, n_layers)), given)
        else:
            module = Transcoder(options, given)
        modules[layer] = _randomise(module, run, layer, generator)
    return TranscoderSet.from_transcoders(modules)


def _randomise(
    module: Transcoder | CrossLayerPart, run: Run, layer: int, generator: torch.Generator
) -> Transcoder | CrossLayerPart:
    config = module.config
    x = run.mid[layer] if config.input_site == "R" else run.mlp_in[layer]
    y = run.mlp_post[layer] if config.output_site == "O'" else run.mlp_out[layer]
    # Medians: many models have one position (the first) with a norm hundreds of times the others',
    # and what is written at its scale everywhere drowns the rest in rounding errors.
    size_x = config.d_in**0.5 if config.input_site == "N0" else _median_norm(x) or 1.0
    size_y = _median_norm(y)
    sizes = {
        "W_enc": 1 / size_x,
        "b_enc": 0.1,
        "W_dec": 0.5 * size_y * config.d_transcoder**-0.5 * config.d_out**-0.5,
        "b_dec": 0.2 * size_y * config.d_out**-0.5,
        "W_skip": 0.5 * size_y / size_x * config.d_out**-0.5,
    }
    for name, parameter in module.named_parameters():
        if name in sizes:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (noise * sizes[name]).to(parameter.dtype)
    return module.requires_grad_(False)


def _median_norm(x: Tensor) -> float:
    return float(x.float().norm(dim=-1).median())

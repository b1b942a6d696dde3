"""The edges of a graph, computed where the model is (torch only: it runs inside a trace there).

What comes up are the vectors of the active features, the errors and the norms' frozen scales; the
patterns are read from this job's own run of the same prompt, and the value and output maps from
the model's modules: their weights where the job can see them, their values on a basis where it
cannot (a sandboxed job's modules have no weights). The sweep is the one that a local graph uses.

Large things stay in the dtype that they have: maps and patterns in the model's, the features'
vectors in the one that they travelled in. What a sweep meets of them is widened when it is met, a
layer at a time (``job_memory.py`` says how much a job takes).

Legend: L layers, T positions, D d_model, F features, G targets, C columns.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.edge_table import edge_table, totals
from nnsight_transcoders.circuits.edges import batch_size, batches
from nnsight_transcoders.circuits.expand import expand
from nnsight_transcoders.circuits.layer_features import ActiveFeatures, LayerFeatures
from nnsight_transcoders.circuits.linear import FrozenLayer, FrozenModel, FrozenNorm, Targets
from nnsight_transcoders.circuits.operator_engine import FrozenEngine

from .job_reads import fitted_attention, frozen_norm, token_directions

#: Fields of ``LayerFeatures`` that stay in the dtype that they came in.
VECTORS = ("encoder", "decoder")


def graph_edges(model: Any, problem: dict[str, Any]) -> dict[str, Any]:
    """All edges of a graph in one go; runs inside a trace.

    Args:
        model: The model.
        problem: From ``remote.edges.edge_problem``.

    Returns:
        The fields of an ``EdgeTable`` (rows packed), the targets' directions and biases.
    """
    with torch.no_grad():
        engine, chosen = _engine(model, problem)
        run, active = _run(problem, engine), _active(problem["sources"], problem, engine)
        candidates = Candidates.build(run, active, chosen, problem["position"], engine)
        rows, expanded = expand(
            candidates, engine, problem["max_nodes"], problem["memory"], verbose=False
        )
        table = edge_table(candidates, rows, expanded)
        return {
            "features": table.features.cpu(),
            "rows": pack_rows(table.rows, problem["result_dtype"]),
            "omitted": table.omitted,
            "total": table.total,
            "bias": table.bias,
            **_directions(chosen),
        }


def chunk_edges(model: Any, problem: dict[str, Any]) -> dict[str, Any]:
    """The edges from some sources into some targets; runs inside a trace.

    The targets are the features of ``problem["targets"]``, or the logits where it is None.

    Returns:
        ``rows`` (packed; columns of the sources' features, then errors and tokens), ``total`` and
        ``bias`` of the targets, and the directions and biases of the logits.
    """
    with torch.no_grad():
        engine, chosen = _engine(model, problem)
        run, active = _run(problem, engine), _active(problem["sources"], problem, engine)
        sources = Candidates.build(run, active, chosen, problem["position"], engine)
        if problem["targets"] is None:
            targets, wanted = sources, torch.zeros(0, dtype=torch.long)
            parts = [sources.logit_targets()]
        else:
            targets = _only_targets(sources, _active(problem["targets"], problem, engine))
            wanted = torch.arange(targets.n_features, device=engine.final.device)
            parts = []
        rows = _rows(engine, sources, targets, wanted, parts, problem["memory"])
        total, bias = totals(targets, wanted)
        return {
            "rows": pack_rows(rows, problem["result_dtype"]),
            "total": total.cpu(),
            "bias": bias.cpu(),
            **_directions(chosen),
        }


def _rows(
    engine: FrozenEngine,
    sources: Candidates,
    targets: Candidates,
    wanted: Tensor,
    parts: list[Targets],
    memory: int,
) -> Tensor:
    """Edge rows of whole targets and of features, in order: ``(n, C)`` on the CPU."""
    n_columns = sources.n_columns
    found = [engine.rows(sources.sources, part, n_columns).cpu() for part in parts]
    if len(wanted):
        final = engine.final
        size = batch_size(len(final), final.shape[1], n_columns, final.element_size(), memory)
        rows = torch.zeros(len(wanted), n_columns, dtype=engine.dtype)
        for chunk in batches(targets.layer, targets.positions, size):
            batch = targets.feature_targets(wanted[chunk])
            rows[chunk.cpu()] = engine.rows(sources.sources, batch, n_columns).cpu()
        found.append(rows)
    return torch.cat(found)


def _only_targets(sources: Candidates, active: ActiveFeatures) -> Candidates:
    """Features as targets: what of ``Candidates`` needs their encoders alone."""
    return Candidates.numbered(
        sources.run,
        active,
        sources.chosen,
        sources.position,
        constants=sources.constants,
        final_constants=sources.final_constants,
    )


def _engine(model: Any, problem: dict[str, Any]) -> tuple[FrozenEngine, Any]:
    """The frozen model of this job's own run, and the targets with their directions."""
    dtype = getattr(torch, problem["dtype"])
    like = model.get(problem["embed"]).output.detach()
    at: dict[str, Any] = {"device": like.device, "dtype": dtype}
    norms = {path: frozen_norm(norm, **at) for path, norm in problem["norms"].items()}
    chosen = _chosen(model, problem, like, at)
    layers = []
    for layer in problem["layers"]:
        attention, difference = fitted_attention(
            model, layer, like, problem["heads"], problem["out_width"], dtype
        )
        if not difference <= problem["limit"]:
            raise RuntimeError(
                f"{layer['attention']} cannot be written as pattern x values x output: its output "
                f"differs by {difference:.1e} (relative)"
            )
        layers.append(
            FrozenLayer(
                attention=attention,
                attention_norm=norms.get(layer["attention_norm"]),
                attention_post_norm=norms.get(layer["attention_post_norm"]),
                read=_read_norm(norms, layer["read"]),
                write=norms.get(layer["write"]),
                skip=None if layer["skip"] is None else layer["skip"].to(like.device),
            )
        )
    frozen = FrozenModel(tuple(layers), norms[problem["final_norm"]], problem["parallel"])
    final = torch.zeros(problem["n_positions"], problem["d_model"], **at)
    position = problem["position_embedding"]
    position = None if position is None else position.to(**at)
    return FrozenEngine(frozen, [], final, position), chosen


def _read_norm(norms: dict[str, FrozenNorm], read: dict[str, Any] | None) -> FrozenNorm | None:
    """The norm before the input site; without its gain and bias where that is site N0."""
    if read is None:
        return None
    norm = norms[read["path"]]
    if not read["plain"]:
        return norm
    return FrozenNorm(torch.ones_like(norm.gain), None, norm.scale, norm.centred)


def _chosen(model: Any, problem: dict[str, Any], like: Tensor, at: dict[str, Any]) -> Any:
    """The targets as ``targets.TargetSpec`` has them."""
    chosen = problem["chosen"]
    index = chosen["index"].to(like.device)
    if chosen["direction"] is not None:
        direction = chosen["direction"].to(**at)
        bias = torch.zeros(len(index), **at)
    else:
        direction, bias = token_directions(model, problem["unembed"], index, like, at)
    return SimpleNamespace(
        names=tuple(range(len(index))),
        index=index,
        direction=direction,
        bias=bias,
        total=chosen["total"].to(**at),
        weight=chosen["weight"].to(**at),
    )


def _directions(chosen: Any) -> dict[str, Tensor]:
    return {"direction": chosen.direction.cpu(), "target_bias": chosen.bias.cpu()}


def _run(problem: dict[str, Any], engine: FrozenEngine) -> Any:
    """What ``Candidates`` asks of a run."""
    final = engine.final
    return SimpleNamespace(
        final=final, n_positions=len(final), embedding=problem["embedding"].to(final)
    )


def _active(
    layers: dict[int, dict[str, Any]], problem: dict[str, Any], engine: FrozenEngine
) -> ActiveFeatures:
    """Features as they came up; without errors where another request brings those."""
    final = engine.final
    error = problem["error"]
    errors = torch.zeros(len(problem["layers"]), *final.shape) if error is None else error
    return ActiveFeatures(
        layers={
            number: LayerFeatures(
                **{k: _at(v, final, widen=k not in VECTORS) for k, v in features.items()}
            )
            for number, features in layers.items()
        },
        bias=[None if bias is None else bias.to(final) for bias in problem["biases"]],
        error=list(errors.to(final)),
        output=[],
    )


def _at(value: Any, like: Tensor, *, widen: bool) -> Any:
    """A tensor on the device, if wanted floats in the dtype of ``like``; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like) if widen and value.is_floating_point() else value.to(like.device)


def pack_rows(rows: Tensor, dtype: str | None) -> dict[str, Any]:
    """A matrix most of which is zero, without its zeros: one bit an entry, and the values."""
    rows = rows.cpu()
    mask = (rows != 0).flatten()
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8).to(torch.uint8)
    bits = (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    values = rows.flatten()[mask]
    if dtype is not None:
        values = values.to(getattr(torch, dtype))
    return {"shape": tuple(rows.shape), "bits": bits, "values": values}


def unpack_rows(packed: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The matrix of ``pack_rows``."""
    bits = packed["bits"][:, None] >> torch.arange(8, dtype=torch.uint8)
    n = packed["shape"][0] * packed["shape"][1]
    mask = (bits & 1).bool().flatten()[:n]
    rows = torch.zeros(n, dtype=dtype)
    rows[mask] = packed["values"].to(dtype)
    return rows.view(packed["shape"])

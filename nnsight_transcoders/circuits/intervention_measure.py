"""Interventions on a graph's nodes as rows of few batches, measured at the graph's own nodes.

Legend: M interventions, N nodes, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nnsight_transcoders.attachment.feature_rows import ELEMENTWISE
from nnsight_transcoders.attachment.replacement import check_layerwise, check_transcodes
from nnsight_transcoders.errors import InputError, MismatchError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.remote.server import Remote, remote_server
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph
from .grouping import NodeKey, numbers_of
from .intervention_request import Asked, PatchedModel, Patching
from .intervention_rows import Changes
from .intervention_run import InterventionRun, Outcome
from .predict import predicted_changes

Mlps = Literal["model", "transcoders"]

#: How many values of one kind a batch may hold (rows x positions x width).
BATCH_ELEMENTS = 64 * 2**20
#: How far the model's own values may be from the graph's (relative), by the model's dtype.
_AGREES = {torch.float64: 1e-4, torch.float32: 1e-2}


@dataclass(frozen=True)
class Measured:
    """What a batch of M interventions gave.

    Attributes:
        factors: Of each, node number -> factor.
        values: ``(M + 1, N)`` activations of the features that were read and values of logits, NaN
            elsewhere; the first row without intervention.
        predicted: ``(M, N)`` changes by the graph's edges.
        logits: ``(M + 1, V)``; None where they were not asked for.
        probabilities: ``(M + 1, V)``; the same.
    """

    factors: Sequence[dict[int, float]]
    values: Tensor
    predicted: Tensor
    logits: Tensor | None
    probabilities: Tensor | None


def measure(
    graph: AttributionGraph,
    changes: Sequence[Mapping[NodeKey, float]],
    model: Any,
    transcoders: TranscoderSet,
    *,
    constrained: Collection[int] = (),
    freeze_attention: bool = True,
    mlps: Mlps = "model",
    read: Collection[NodeKey] | None = None,
    directions: Mapping[str, Tensor] | None = None,
    sites: Sites | None = None,
    remote: Remote | None = None,
    whole_logits: bool = True,
) -> Iterator[Measured]:
    """Run interventions, each on its own; of a remote model, one request for each batch.

    Args:
        graph: The graph.
        changes: The interventions.
        model: See ``AttributionGraph.intervene``.
        transcoders: See there; so are the others.
        whole_logits: Whether all logits are wanted.
    """
    asked = [_factors(graph, one) for one in changes]
    if mlps not in get_args(Mlps):
        raise InputError(f"unknown mlps {mlps!r}: use 'model' or 'transcoders'")
    if any(i < 0 for i in graph.token_ids):
        raise InputError("the graph does not know all its token ids, so that it cannot be run")
    server = remote_server(remote)
    sites = _checked_sites(model, transcoders, sites, weights=server is None)
    pinned = _pinned(constrained, sites)
    follow = frozenset(transcoders.layers if mlps == "transcoders" else ()) - pinned
    _check_features(graph, transcoders)
    features = _by_layer(graph, _features_to_read(graph, asked, read))
    patched = PatchedModel(
        model,
        sites,
        transcoders,
        torch.tensor(graph.token_ids),
        Patching(pinned, follow, freeze_attention, server),
        Asked(
            _target_position(graph),
            *_targets(graph, directions or {}),
            {layer: (graph.position[n], graph.index[n]) for layer, n in features.items()},
            whole_logits,
        ),
    )
    run = InterventionRun(patched)
    n_positions = len(graph.token_ids)
    widths = [sites.d_model, sites.n_heads * n_positions, sites.vocab_size if whole_logits else 0]
    widths += _encoded(transcoders, features, follow)
    size = max(1, BATCH_ELEMENTS // (n_positions * max(widths)) - 1)
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        outcome = run.run(len(part) + 1, *_changes(graph, part))
        values = _node_values(graph, features, outcome)
        _check_same_run(graph, values[0], patched.model_dtype)
        predicted = predicted_changes(graph, _factor_table(graph, part), pinned)
        yield Measured(part, values, predicted, outcome.logits, outcome.probabilities)


# -- what is asked for ---------------------------------------------------------------------------


def _factors(graph: AttributionGraph, changes: Mapping[NodeKey, float]) -> dict[int, float]:
    """Node number -> factor.

    Raises:
        InputError: Nothing to change, a logit, a node named twice, or no number.
    """
    if not changes:
        raise InputError("nothing to change: give {node: factor, ...}")
    found: dict[int, float] = {}
    for key, factor in changes.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor != factor:
            raise InputError(f"node {key!r}: {factor!r} is no factor to multiply an activation by")
        for number in numbers_of(graph, key):
            if graph.kind[number] == LOGIT:
                raise InputError(
                    f"{graph.label(number)} (node {number}) is a target: features, errors and "
                    "tokens can be changed"
                )
            if number in found:
                raise InputError(f"node {graph.node(number).id} is named twice")
            found[number] = float(factor)
    return found


def _features_to_read(
    graph: AttributionGraph,
    asked: Sequence[Mapping[int, float]],
    read: Collection[NodeKey] | None,
) -> Tensor:
    """Numbers of the features whose activations are wanted; those that are changed are among them,
    since their rows are there anyway.

    Raises:
        InputError: ``read`` names a node that is no feature.
    """
    if read is None:
        return graph.of_kind("feature")
    numbers = [number for key in read for number in numbers_of(graph, key)]
    for number in numbers:
        if graph.kind[number] != FEATURE:
            raise InputError(f"read= names features; {graph.label(number)} is none")
    numbers += [n for one in asked for n in one if graph.kind[n] == FEATURE]
    return torch.tensor(sorted(set(numbers)), dtype=torch.long)


def _checked_sites(
    model: Any, transcoders: TranscoderSet, sites: Sites | None, *, weights: bool
) -> Sites:
    """The model's sites, the model and the set being what can be run."""
    if "transcoders" in getattr(model, "__dict__", {}):
        raise InputError("this model has transcoders attached: give the original model")
    module = hf_module(model, weights=weights)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    check_transcodes(transcoders)
    check_layerwise(transcoders)
    return sites


def _pinned(constrained: Collection[int], sites: Sites) -> frozenset[int]:
    pinned = frozenset(constrained)
    if not pinned <= set(range(sites.n_layers)):
        raise InputError(
            f"constrained layers {sorted(pinned)}: the model has layers 0 to {sites.n_layers - 1}"
        )
    return pinned


def _check_features(graph: AttributionGraph, transcoders: TranscoderSet) -> None:
    """Check that the set has the graph's features.

    Raises:
        MismatchError: It lacks one.
    """
    for layer, numbers in _by_layer(graph, graph.of_kind("feature")).items():
        width = transcoders.config(layer).d_transcoder if layer in transcoders else 0
        highest = int(graph.index[numbers].max())
        if highest >= width:
            raise MismatchError(
                f"the graph has feature {highest} of layer {layer}; the set has {width} there"
            )


def _by_layer(graph: AttributionGraph, numbers: Tensor) -> dict[int, Tensor]:
    layers = graph.layer[numbers]
    return {layer: numbers[layers == layer] for layer in sorted(set(layers.tolist()))}


def _target_position(graph: AttributionGraph) -> int:
    positions = set(graph.position[graph.of_kind("logit")].tolist())
    if len(positions) != 1:
        raise InputError(f"the graph's targets stand at {len(positions)} positions, expected one")
    return positions.pop()


def _targets(
    graph: AttributionGraph, directions: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The targets' tokens ``(G,)``, -1 for directions; and directions ``(G, D)`` if there are any.

    Raises:
        InputError: A direction that was not given.
    """
    tokens = graph.index[graph.of_kind("logit")].clamp_min(-1)
    named = dict(zip(graph.target_names, tokens.tolist(), strict=True))
    for name, token in named.items():
        if token < 0 and name not in directions:
            raise InputError(
                f"target {name!r} is a direction, which the graph does not hold: pass "
                f"directions={{{name!r}: vector}}"
            )
    if all(token >= 0 for token in named.values()):
        return tokens, None
    given = [None if token >= 0 else directions[name].detach() for name, token in named.items()]
    like = next(one for one in given if one is not None)
    return tokens, torch.stack([torch.zeros_like(like) if one is None else one for one in given])


def _encoded(
    transcoders: TranscoderSet, features: Mapping[int, Tensor], follow: Collection[int]
) -> Iterator[int]:
    """How many features of each layer are encoded."""
    for layer in transcoders.layers:
        config = transcoders.config(layer)
        competing = layer in features and config.activation not in ELEMENTWISE
        whole = layer in follow or competing
        yield config.d_transcoder if whole else len(features.get(layer, ()))


# -- to and from the run -------------------------------------------------------------------------


def _changes(
    graph: AttributionGraph, asked: Sequence[Mapping[int, float]]
) -> tuple[dict[int, Changes], dict[int, Changes], Changes | None]:
    """The changes of a batch: features and errors by layer, tokens; row 0 is without any."""
    entries = [(row, n, f) for row, one in enumerate(asked, start=1) for n, f in one.items()]
    grouped: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for row, n, factor in entries:
        grouped.setdefault((int(graph.kind[n]), int(graph.layer[n])), []).append((row, n, factor))
    found: dict[int, dict[int, Changes]] = {FEATURE: {}, ERROR: {}, TOKEN: {}}
    for (kind, layer), part in grouped.items():
        rows, numbers, factors = zip(*part, strict=True)
        at = torch.tensor(numbers)
        found[kind][layer] = Changes(
            row=torch.tensor(rows),
            position=graph.position[at],
            index=graph.index[at],
            factor=torch.tensor(factors, dtype=torch.float64),
        )
    return found[FEATURE], found[ERROR], next(iter(found[TOKEN].values()), None)


def _factor_table(graph: AttributionGraph, asked: Sequence[Mapping[int, float]]) -> Tensor:
    table = torch.full((len(asked), graph.n_nodes), float("nan"), dtype=torch.float64)
    for row, factors in enumerate(asked):
        table[row, list(factors)] = torch.tensor(list(factors.values()), dtype=torch.float64)
    return table


def _node_values(
    graph: AttributionGraph, features: Mapping[int, Tensor], outcome: Outcome
) -> Tensor:
    """``(M + 1, N)`` activations of features and values of logits; NaN elsewhere."""
    n_rows = len(outcome.targets)
    values = torch.full((n_rows, graph.n_nodes), float("nan"), dtype=torch.float64)
    for layer, numbers in features.items():
        values[:, numbers] = outcome.activations[layer].double()
    values[:, graph.of_kind("logit")] = outcome.targets
    return values


def _check_same_run(graph: AttributionGraph, before: Tensor, dtype: torch.dtype) -> None:
    """Whether the model and set are those that the graph is of."""
    read = ((graph.kind == FEATURE) & ~before.isnan()).nonzero().flatten()
    if not len(read):
        return
    expected, found = graph.value[read].double(), before[read]
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if difference > _AGREES.get(dtype, 0.1):
        raise MismatchError(
            f"the features' activations on this prompt differ from the graph's by {difference:.1e} "
            "(relative): this is not the model or the transcoder set that the graph was made with"
        )

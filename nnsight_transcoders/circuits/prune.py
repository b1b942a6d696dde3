"""Influence, scores and pruning of an attribution graph: pure functions of edge lists.

Definitions after Ameisen et al. 2025, "Circuit Tracing", as in circuit-tracer, whose defaults
(``node_threshold=0.8``, ``edge_threshold=0.98``) users know. ``B`` is ``|A|`` with each target's
row normalised to sum one; the influence on the logits is ``p (B + B^2 + ...)`` with ``p`` the
logits' weights. The graph is acyclic, so the series is a finite sum.

Legend: N nodes, E edges; ``source``, ``target``, ``weight`` are ``(E,)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError

#: Edges looked at together: a long prompt's graph has a hundred million, and a double-precision
#: copy of all of them would be larger than the graph.
EDGES_AT_A_TIME = 4 * 2**20


def normalised_weights(target: Tensor, weight: Tensor, n_nodes: int) -> Tensor:
    """``(E,)``: ``|weight|`` divided by the sum over the same target's edges."""
    size = weight.abs().double()
    sums = torch.zeros(n_nodes, dtype=size.dtype, device=size.device)
    sums.index_add_(0, target, size)
    return size / sums[target].clamp_min(1e-300)


def _incoming(target: Tensor, weight: Tensor, n_nodes: int) -> Tensor:
    """``(N,)``: the sum of ``|weight|`` over each target's edges, in double precision."""
    sums = torch.zeros(n_nodes, dtype=torch.float64, device=weight.device)
    for part, into in zip(
        weight.split(EDGES_AT_A_TIME), target.split(EDGES_AT_A_TIME), strict=True
    ):
        sums.index_add_(0, into, part.abs().double())
    return sums


def influence(
    source: Tensor, target: Tensor, weight: Tensor, logit_weights: Tensor, n_nodes: int
) -> Tensor:
    """``(N,)`` influence of each node on the logits: ``p (B + B^2 + ...)``.

    Raises:
        InputError: The edges have a cycle, so that the series does not end.
    """
    incoming = _incoming(target, weight, n_nodes).clamp_min_(1e-300)
    edges = [column.split(EDGES_AT_A_TIME) for column in (source, target, weight)]
    reached = logit_weights.double()
    total = torch.zeros_like(reached)
    for _ in range(n_nodes + 1):
        step, per_weight = torch.zeros_like(reached), reached / incoming
        for start, into, size in zip(*edges, strict=True):
            step.index_add_(0, start, per_weight[into] * size.abs())
        if not step.any():
            return total
        total += step
        reached = step
    raise InputError("the graph's edges have a cycle, so that its influence is not defined")


def replacement_score(node_influence: Tensor, is_token: Tensor, is_error: Tensor) -> float:
    """Token influence as a share of token plus error influence; 1 if nothing arrives at either."""
    tokens, errors = node_influence[is_token].sum(), node_influence[is_error].sum()
    if tokens + errors == 0:
        return 1.0
    return float(tokens / (tokens + errors))


def completeness_score(
    source: Tensor, target: Tensor, weight: Tensor, output_influence: Tensor, is_error: Tensor
) -> float:
    """Mean share of a node's input that is not from error nodes, weighted by its influence."""
    n_nodes = len(output_influence)
    errors = is_error[source]
    from_error = _incoming(target[errors], weight[errors], n_nodes)
    from_error /= _incoming(target, weight, n_nodes).clamp_min_(1e-300)
    total = output_influence.sum()
    if total == 0:
        return 1.0
    return float(((1 - from_error) * output_influence).sum() / total)


def _fewest(scores: Tensor, threshold: float) -> Tensor:
    """Mask of the fewest entries whose scores sum to at least ``threshold`` of all."""
    order = scores.argsort(descending=True, stable=True)
    reached = scores[order].cumsum(0)
    needed = int((reached < threshold * reached[-1]).sum()) + 1 if len(scores) else 0
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:needed]] = True
    return mask & (scores > 0)


def prune_masks(
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    logit_weights: Tensor,
    *,
    is_kept_always: Tensor,
    is_error: Tensor,
    node_threshold: float,
    edge_threshold: float,
) -> tuple[Tensor, Tensor]:
    """Which nodes ``(N,)`` and edges ``(E,)`` to keep.

    Args:
        source: Edge sources.
        target: Edge targets.
        weight: Edge weights.
        logit_weights: ``(N,)`` the logits' weights.
        is_kept_always: ``(N,)`` logits and tokens.
        is_error: ``(N,)`` error nodes: they have no inputs, so only outgoing edges keep them.
        node_threshold: Share of the nodes' influence to keep.
        edge_threshold: Share of the edges' influence to keep.

    Raises:
        InputError: A threshold outside (0, 1].
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, got {value}")
    n_nodes = len(logit_weights)
    keep_nodes = is_kept_always | _fewest(
        influence(source, target, weight, logit_weights, n_nodes), node_threshold
    )
    inside = keep_nodes[source] & keep_nodes[target]
    kept_weight = torch.where(inside, weight, torch.zeros_like(weight))
    reach = influence(source, target, kept_weight, logit_weights, n_nodes) + logit_weights
    edge_score = normalised_weights(target, kept_weight, n_nodes) * reach[target]
    keep_edges = _fewest(edge_score, edge_threshold)
    keep_nodes = _connected(source, target, keep_edges, keep_nodes, is_kept_always, is_error)
    return keep_nodes, keep_edges & keep_nodes[source] & keep_nodes[target]


def _connected(
    source: Tensor,
    target: Tensor,
    keep_edges: Tensor,
    keep_nodes: Tensor,
    is_kept_always: Tensor,
    is_error: Tensor,
) -> Tensor:
    """Drop nodes without an outgoing edge, and features without an incoming one, until none is."""
    while True:
        alive = keep_edges & keep_nodes[source] & keep_nodes[target]
        has_out = torch.zeros_like(keep_nodes).index_fill(0, source[alive], True)
        has_in = torch.zeros_like(keep_nodes).index_fill(0, target[alive], True)
        still = keep_nodes & (is_kept_always | (has_out & (has_in | is_error)))
        if torch.equal(still, keep_nodes):
            return keep_nodes
        keep_nodes = still

"""Where an attribution graph's nodes get their input from, layer by layer (torch only)."""

from __future__ import annotations

import torch

from .graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph
from .prune import normalised_weights


def completeness_by_layer(graph: AttributionGraph) -> dict[int, dict[str, float]]:
    """Shares of the input of each layer's nodes that come from features, tokens and errors.

    The completeness score (Ameisen et al. 2025) taken apart: a node's input is the sum of the
    magnitudes of its incoming edges, and nodes count by their influence on the logits. One minus
    ``errors`` is a layer's completeness. (The score of the whole graph also counts the tokens and
    errors themselves, which have no input, as complete.)

    Returns:
        Layer -> ``features``, ``tokens``, ``errors`` (which sum to one) and ``weight``, the share
            of the influence that its nodes have. The logits are layer ``n_layers``. A layer whose
            nodes have no input or no influence is left out.
    """
    n_nodes = len(graph.kind)
    share = normalised_weights(graph.target, graph.weight, n_nodes)
    reach = graph.influence() + graph.logit_weights()
    is_target = (graph.kind == FEATURE) | (graph.kind == LOGIT)
    has_input = torch.zeros(n_nodes, dtype=torch.bool)
    has_input[graph.target[graph.weight != 0]] = True
    total = reach[is_target].sum()
    names = {"features": FEATURE, "tokens": TOKEN, "errors": ERROR}
    found: dict[int, dict[str, float]] = {}
    for layer in sorted(set(graph.layer[is_target & has_input].tolist())):
        here = is_target & has_input & (graph.layer == layer)
        weight = reach[here].sum()
        if weight == 0:
            continue
        into = here[graph.target]
        flow = share[into] * reach[graph.target[into]] / weight
        kinds = graph.kind[graph.source[into]]
        found[layer] = {name: float(flow[kinds == code].sum()) for name, code in names.items()}
        found[layer]["weight"] = float(weight / total)
    return found

"""Parts of an attribution graph that still close (torch only).

What falls away is not lost: its direct effects on the nodes that stay are added to their
``omitted``, so that every target's row sums to what it did.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .graph_io import KINDS
from .prune import prune_masks

if TYPE_CHECKING:
    from .graph import AttributionGraph

ERROR, TOKEN, LOGIT = map(KINDS.index, ("error", "token", "logit"))


def pruned(
    graph: AttributionGraph, node_threshold: float, edge_threshold: float
) -> AttributionGraph:
    """See ``AttributionGraph.prune``."""
    keep_nodes, keep_edges = prune_masks(
        graph.source,
        graph.target,
        graph.weight,
        graph.logit_weights(),
        is_kept_always=(graph.kind == LOGIT) | (graph.kind == TOKEN),
        is_error=graph.kind == ERROR,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
    )
    before = {
        "node_threshold": node_threshold,
        "edge_threshold": edge_threshold,
        "nodes_before": graph.n_nodes,
        "edges_before": graph.n_edges,
        "replacement_score_before": graph.replacement_score,
        "completeness_score_before": graph.completeness_score,
    }
    part = subgraph(graph, keep_nodes, keep_edges)
    return replace(part, metadata={**graph.metadata, "pruning": before})


def subgraph(
    graph: AttributionGraph, keep_nodes: Tensor, keep_edges: Tensor | None
) -> AttributionGraph:
    """See ``AttributionGraph.subgraph``."""
    inside = keep_nodes[graph.source] & keep_nodes[graph.target]
    keep = inside if keep_edges is None else inside & keep_edges
    gone = graph.weight[~keep].double()
    omitted = graph.omitted.double().index_add(0, graph.target[~keep], gone)
    number = torch.cumsum(keep_nodes, 0) - 1
    logits = graph.of_kind("logit").tolist()
    names = zip(graph.target_names, logits, strict=True)
    per_node = {
        name: getattr(graph, name)[keep_nodes]
        for name in ("kind", "layer", "position", "index", "value", "total", "bias", "probability")
    }
    return replace(
        graph,
        **per_node,
        omitted=omitted.to(graph.omitted.dtype)[keep_nodes],
        source=number[graph.source[keep]],
        target=number[graph.target[keep]],
        weight=graph.weight[keep],
        target_names=tuple(name for name, i in names if keep_nodes[i]),
    )

"""An attribution graph as text and as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_transcoders.errors import InputError

from .graph_io import KINDS

if TYPE_CHECKING:
    import networkx

    from .graph import AttributionGraph


def to_networkx(graph: AttributionGraph) -> networkx.DiGraph:
    """See ``AttributionGraph.to_networkx``."""
    try:
        import networkx
    except ImportError as error:
        raise InputError(
            "to_networkx needs networkx: pip install 'nnsight-transcoders[viz]'"
        ) from error
    out = networkx.DiGraph(**graph.metadata)
    nodes = list(graph.nodes())
    for node in nodes:
        out.add_node(
            node.id,
            kind=node.kind,
            layer=node.layer,
            position=node.position,
            index=node.index,
            value=node.value,
            label=graph.label(node.number),
        )
    edges = zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    for source, target, weight in edges:
        out.add_edge(nodes[source].id, nodes[target].id, weight=weight)
    return out


def summary(graph: AttributionGraph, top: int) -> str:
    """See ``AttributionGraph.summary``."""
    counts = ", ".join(f"{len(graph.of_kind(kind))} {kind}" for kind in KINDS)
    error = f"completeness error {graph.completeness_error:.1e}"
    if graph.metadata.get("totals") == "not recorded":  # read from another tool's file
        error = "completeness not recorded"
    lines = [
        f"AttributionGraph of {''.join(graph.tokens)!r}",
        f"  {graph.n_nodes} nodes ({counts}), {graph.n_edges} edges",
        f"  {error}   replacement score "
        f"{graph.replacement_score:.3f}   completeness score {graph.completeness_score:.3f}",
    ]
    logits = graph.of_kind("logit").tolist()
    lines += [f"  {graph.label(i)} value {float(graph.value[i]):+.3f}" for i in logits[:top]]
    influence = graph.influence().masked_fill(graph.kind != KINDS.index("feature"), 0.0)
    best = influence.argsort(descending=True)[:top].tolist()
    if best and influence[best[0]] > 0:
        lines.append("  most influential features:")
    for i in best:
        if influence[i] > 0:
            lines.append(f"    {float(influence[i]):.4f}  {graph.label(i)}")
    return "\n".join(lines)

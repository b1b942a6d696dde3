"""Names for a graph's nodes (supernodes, pinned nodes, labels), and nodes by their names.

They live in the graph's metadata as JSON under the nodes' ids, which pruning and files keep:
``{"supernodes": {name: [id, ...]}, "pinned": [id, ...], "labels": {id: text}}``. Grouping features
by hand into supernodes is how circuits are read in Ameisen et al. 2025, "Circuit Tracing".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_transcoders.errors import InputError

if TYPE_CHECKING:
    from .graph import AttributionGraph, Node

#: What names one node or several: a number, an id (``"2_355_7"``), a ``Node``, or a supernode.
NodeKey = Any


def with_names(
    graph: AttributionGraph,
    supernodes: Mapping[str, Iterable[int | str | Node]] | None,
    pinned: Iterable[int | str | Node] | None,
    labels: Mapping[int | str | Node, str] | None,
) -> AttributionGraph:
    """See ``AttributionGraph.named``."""
    ids = node_ids(graph)
    known, metadata = set(ids), dict(graph.metadata)

    def id_of(key: int | str | Node) -> str:
        if isinstance(key, str) and key in known:  # a file may name thousands
            return key
        return ids[number_of(graph, key)]

    if supernodes is not None:
        metadata["supernodes"] = {
            str(name): [id_of(member) for member in members] for name, members in supernodes.items()
        }
        for name, members in metadata["supernodes"].items():
            if not members:
                raise InputError(f"supernode {name!r} has no nodes")
            if name in known:
                raise InputError(f"supernode {name!r} has the name of a node: choose another")
    if pinned is not None:
        metadata["pinned"] = [id_of(node) for node in pinned]
    if labels is not None:
        metadata["labels"] = {id_of(node): str(text) for node, text in labels.items()}
    return replace(graph, metadata=metadata)


def node_ids(graph: AttributionGraph) -> list[str]:
    """The ids of all nodes in order."""
    return [node.id for node in graph.nodes()]


def supernodes(graph: AttributionGraph) -> dict[str, list[int]]:
    """Supernode name -> numbers of its members that are in the graph (pruning drops some)."""
    number = {name: i for i, name in enumerate(node_ids(graph))}
    named = graph.metadata.get("supernodes", {})
    return {name: [number[i] for i in ids if i in number] for name, ids in named.items()}


def number_of(graph: AttributionGraph, key: int | str | Node) -> int:
    """The number of one node, named by its number, its id, or itself.

    Raises:
        InputError: It is not a node of this graph.
    """
    if isinstance(key, bool) or not isinstance(key, int | str) and not hasattr(key, "id"):
        raise InputError(f"a node is named by its number, its id or a Node, not by {key!r}")
    if isinstance(key, int):
        return graph.node(key).number
    name = key if isinstance(key, str) else key.id
    for node in graph.nodes():
        if node.id == name:
            return node.number
    raise InputError(
        f"{name!r} is no node of this graph (feature ids are 'layer_feature_position'); its "
        f"supernodes: {', '.join(graph.metadata.get('supernodes', {})) or 'none'}"
    )


def numbers_of(graph: AttributionGraph, key: NodeKey) -> list[int]:
    """The numbers a key stands for: one node's, a supernode's, or those of a tuple of nodes.

    Raises:
        InputError: Neither, or a supernode none of whose members is in the graph.
    """
    if isinstance(key, tuple | frozenset):
        return [number_of(graph, one) for one in key]
    if isinstance(key, str) and key in graph.metadata.get("supernodes", {}):
        members = supernodes(graph)[key]
        if not members:
            raise InputError(f"no member of supernode {key!r} is in this graph (pruned away?)")
        return members
    return [number_of(graph, key)]

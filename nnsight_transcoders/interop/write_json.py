"""An ``AttributionGraph`` as graph JSON: one canonical form, two exporters.

Neuronpedia wants a model id as ``scan`` and refuses anything with a slash; circuit-tracer's page
wants a Hub id or a folder of feature files, and compulsory keys that Neuronpedia does not know. The
nodes and links are the same. What the format has no place for (totals, constant terms, error and
token norms, the whole record) is kept under a key of ours, so that our own files come back as they
were; other readers pass over it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders._version import __version__
from nnsight_transcoders.circuits.graph import AttributionGraph, Node
from nnsight_transcoders.circuits.grouping import supernodes
from nnsight_transcoders.errors import CheckpointError, InputError

from .names import (
    FEATURE_TYPES,
    cantor,
    check_name,
    defused,
    js_node_id,
    node_id,
    vocabulary_id,
)
from .schema import validate_graph

#: The key that holds what the format has no place for, in the metadata and in each node.
OWN_KEY = "nnsight_transcoders"
OWN_VERSION = 1


def neuronpedia_json(
    graph: AttributionGraph,
    *,
    slug: str,
    model_id: str,
    source_set: str | None = None,
    feature_url: str | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    description: str | None = None,
    creator: str | None = None,
) -> dict[str, Any]:
    """See ``AttributionGraph.to_neuronpedia``."""
    check_name("slug", slug)
    check_name("model_id", model_id)
    if source_set is not None and feature_url is not None:
        raise InputError("feature details come from source_set or from feature_url, not both")
    graph, influence = pruned_with_influence(graph, node_threshold, edge_threshold)
    info: dict[str, Any] = {
        "generator": {"name": "nnsight-transcoders", "version": __version__},
        "description": description,
        "creator_name": creator,
    }
    details: dict[str, Any] = {}
    if source_set is not None:
        check_name("source_set", source_set)
        details["neuronpedia_source_set"] = info["neuronpedia_source_set"] = source_set
    if feature_url is not None:
        if not feature_url.startswith("https://"):
            raise InputError(f"feature_url {feature_url!r} must start with https://")
        details["feature_json_base_url"] = feature_url.rstrip("/")
    metadata = {
        **_metadata(graph, slug, model_id),
        "info": {key: value for key, value in info.items() if value is not None},
        "generation_settings": _known(
            graph.metadata.get("settings", {}),
            ("max_n_logits", "desired_logit_prob", "max_feature_nodes"),
        ),
        "pruning_settings": _known(
            graph.metadata.get("pruning", {}), ("node_threshold", "edge_threshold")
        ),
    }
    if details:
        metadata["feature_details"] = details
    data = _document(graph, metadata, influence)
    validate_graph(data, "neuronpedia")
    return data


def circuit_tracer_json(
    graph: AttributionGraph,
    *,
    slug: str,
    scan: str,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> dict[str, Any]:
    """See ``AttributionGraph.to_circuit_tracer``."""
    check_name("slug", slug)
    if not scan:
        raise InputError("scan is empty: give the transcoders' Hub id, which features come from")
    graph, influence = pruned_with_influence(graph, node_threshold, edge_threshold)
    metadata = {
        **_metadata(graph, slug, defused(scan)),
        "transcoder_list": [],
        "schema_version": 1,
    }
    data = _document(graph, metadata, influence)
    validate_graph(data, "circuit-tracer")
    return data


def write_circuit_tracer_folder(data: Mapping[str, Any], folder: Path) -> Path:
    """Write ``{slug}.json`` and list it in ``graph-metadata.json``, as the local page wants.

    Raises:
        CheckpointError: There is a ``graph-metadata.json`` that is none.
    """
    slug, listing = data["metadata"]["slug"], folder / "graph-metadata.json"
    graphs: list[Any] = []
    if listing.exists():
        try:
            graphs = json.loads(listing.read_text(encoding="utf-8"))["graphs"]
            graphs = [one for one in graphs if one["slug"] != slug]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{listing} is not circuit-tracer's list of graphs") from error
    path = write_json(data, folder / f"{slug}.json")
    about = {key: value for key, value in data["metadata"].items() if key != OWN_KEY}
    write_json({"graphs": [*graphs, about]}, listing)
    return path


def write_json(data: Mapping[str, Any], path: Path) -> Path:
    """Write JSON; NaN is refused."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def pruned_with_influence(
    graph: AttributionGraph, node_threshold: float, edge_threshold: float
) -> tuple[AttributionGraph, list[float]]:
    """The graph once pruned, and each node's cumulative share of the whole graph's influence.

    A graph that was pruned before is taken as it is; its nodes' shares are then of the influence
    that pruning kept, so that none lies above the threshold.
    """
    if "pruning" in graph.metadata:
        kept = float(graph.metadata["pruning"].get("node_threshold", 1.0))
        return graph, [kept * share for share in cumulative_influence(graph).tolist()]
    shares = dict(zip((n.id for n in graph.nodes()), cumulative_influence(graph), strict=True))
    pruned = graph.prune(node_threshold, edge_threshold)
    return pruned, [float(shares[node.id]) for node in pruned.nodes()]


def cumulative_influence(graph: AttributionGraph) -> Tensor:
    """``(N,)`` share of all influence that nodes at least as influential as this one have."""
    influence = graph.influence()
    order = influence.argsort(descending=True, stable=True)
    total = influence.sum().clamp_min(1e-300)
    shares = influence.clone()
    shares[order] = influence[order].cumsum(0) / total
    return shares.clamp_max(1.0)


# -- the document --------------------------------------------------------------------------------


def _metadata(graph: AttributionGraph, slug: str, scan: str) -> dict[str, Any]:
    return {
        "slug": slug,
        "scan": scan,
        "prompt_tokens": [defused(token) for token in graph.tokens],
        "prompt": defused("".join(graph.tokens)),
        "node_threshold": float(graph.metadata.get("pruning", {}).get("node_threshold", 1.0)),
        OWN_KEY: {
            "version": OWN_VERSION,
            "tokens": list(graph.tokens),
            "token_ids": list(graph.token_ids),
            "target_names": list(graph.target_names),
            "dtype": str(graph.weight.dtype).removeprefix("torch."),
            "metadata": _public(graph.metadata),
        },
    }


def _public(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A graph's record without folders of the machine it was made on: these files are shared."""
    found = {
        key: _public(value) if isinstance(value, Mapping) else value
        for key, value in metadata.items()
        if key != "folder"
    }
    model = found.get("model")
    if isinstance(model, str) and Path(model).is_absolute():
        found["model"] = Path(model).name
    return found


def _known(settings: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if settings.get(key) is not None}


def _document(
    graph: AttributionGraph, metadata: Mapping[str, Any], influence: list[float]
) -> dict[str, Any]:
    nodes = list(graph.nodes())
    ids = [node_id(node, graph.n_layers) for node in nodes]
    first = int(graph.of_kind("logit")[0]) if len(graph.of_kind("logit")) else -1
    pinned, groups = pinned_and_groups(graph)
    return {
        "metadata": dict(metadata),
        "qParams": {
            "pinnedIds": pinned,
            "supernodes": groups,
            "linkType": "both",
            "clickedId": ids[first] if first >= 0 else "",
            "sg_pos": "",
        },
        "nodes": [
            _node(graph, node, ids[node.number], influence[node.number], node.number == first)
            for node in nodes
        ],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(
                graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True
            )
        ],
    }


def pinned_and_groups(graph: AttributionGraph) -> tuple[list[str], list[list[str]]]:
    """Pinned node ids and ``[label, id, ...]`` groups. Members of a group are pinned, too: the
    pages show a group only then."""
    nodes = list(graph.nodes())
    ids = [node_id(node, graph.n_layers) for node in nodes]
    by_own_id = {node.id: name for node, name in zip(nodes, ids, strict=True)}
    groups = [
        [defused(name), *(ids[i] for i in members)]
        for name, members in supernodes(graph).items()
        if members
    ]
    pinned = [by_own_id[i] for i in graph.metadata.get("pinned", []) if i in by_own_id]
    members = [i for group in groups for i in group[1:]]
    return list(dict.fromkeys([*pinned, *members])), groups


def _node(
    graph: AttributionGraph, node: Node, name: str, influence: float, is_first: bool
) -> dict[str, Any]:
    i = node.number
    feature = {"feature": -1, "error": -1, "token": node.position, "logit": node.index}[node.kind]
    layer = str(node.layer)
    if node.kind == "feature":
        feature = cantor(node.layer, node.index)
    elif node.kind == "token":
        layer = "E"
    elif node.kind == "logit":
        feature, layer = vocabulary_id(node.index), str(graph.n_layers + 1)
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": FEATURE_TYPES[node.kind],
        "jsNodeId": js_node_id(node),
        "clerp": label_of(graph, node),
        "influence": influence if node.kind != "logit" else None,
        "activation": node.value if node.kind == "feature" else None,
        "token_prob": float(graph.probability[i]),
        "is_target_logit": is_first,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        OWN_KEY: [node.value, *(float(t[i]) for t in (graph.total, graph.bias, graph.omitted))],
    }


def label_of(graph: AttributionGraph, node: Node) -> str:
    """A node's ``clerp``: the graph's label, or what the pages show for a logit."""
    label = graph.metadata.get("labels", {}).get(node.id)
    if node.kind == "logit":
        chance = f"(p={float(graph.probability[node.number]):.3f})"
        if label is not None:
            return f"{defused(label)} {chance}"
        name = graph.target_names[int((graph.of_kind("logit") == node.number).nonzero())]
        return f'Output "{defused(name)}" {chance}'
    return defused(label or "")

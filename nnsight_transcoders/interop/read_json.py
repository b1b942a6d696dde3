"""Graph JSON of Neuronpedia, circuit-tracer or this package as an ``AttributionGraph``.

Files come from strangers: everything is checked (``schema.py``) before a tensor is made of it. What
the format does not record (totals, constant terms) comes back from our own files; of others' the
graph says so in ``metadata["totals"]``, and its totals are the sums of what is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph
from nnsight_transcoders.circuits.graph_io import KINDS
from nnsight_transcoders.errors import CheckpointError

from .names import KIND_OF_TYPE, restored, target_index
from .schema import validate_graph
from .write_json import OWN_KEY, OWN_VERSION, label_of, pinned_and_groups

#: Largest file that is read; Neuronpedia takes up to 100 MiB, compressed.
MAX_BYTES = 2 << 30
#: What the graph's metadata says where a file holds no totals.
NOT_RECORDED = "not recorded"
_LOGIT_TEXT = re.compile(r'(?:Output )?"(.*)" \(p=[^()]*\)', re.DOTALL)


def read_graph_json(source: str | Path | Mapping[str, Any]) -> AttributionGraph:
    """See ``AttributionGraph.from_neuronpedia``."""
    data = source if isinstance(source, Mapping) else load_json(Path(source))
    data = dict(data)
    validate_graph(data)
    own = _own_record(data)
    nodes = data["nodes"]
    tables = _node_tables(nodes, None if own is None else own["dtype"])
    order = _canonical_order(tables)
    tables = {name: table[order] for name, table in tables.items()}
    nodes = [nodes[i] for i in order.tolist()]
    number = {node["node_id"]: i for i, node in enumerate(nodes)}
    links = data["links"]
    weight = torch.tensor([link["weight"] for link in links], dtype=tables["total"].dtype)
    source_of = torch.tensor([number[link["source"]] for link in links], dtype=torch.long)
    target_of = torch.tensor([number[link["target"]] for link in links], dtype=torch.long)
    if own is None:
        tables["total"] = tables["total"].index_add(0, target_of, weight)
    n_layers = int(tables["layer"].max())
    rank = (target_of * (len(nodes) + 1) + source_of).argsort()
    graph = AttributionGraph(
        **tables,
        source=source_of[rank],
        target=target_of[rank],
        weight=weight[rank],
        tokens=_tokens(data["metadata"], own),
        token_ids=_token_ids(data["metadata"], tables, own),
        target_names=_target_names(nodes, own),
        metadata=_metadata(data, own, n_layers),
    )
    return _with_names(graph, data, nodes, own)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file that must be an object.

    Raises:
        CheckpointError: Not readable, not JSON, too large, or with numbers JSON does not have.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"it has {constant}, which JSON does not have")

    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_BYTES} are read")
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} as graph JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a graph's object")
    return data


# -- tables --------------------------------------------------------------------------------------


def _node_tables(nodes: Sequence[Mapping[str, Any]], dtype: str | None) -> dict[str, Tensor]:
    """All tables of the nodes in the file's order; totals from our own key, or zero."""
    wide = torch.float64 if dtype == "float64" else torch.float32
    kinds = [KINDS.index(KIND_OF_TYPE[node["feature_type"]]) for node in nodes]
    places = [_place(node, kind) for node, kind in zip(nodes, kinds, strict=True)]
    layer, index = zip(*places, strict=True)
    exact = [
        node[OWN_KEY] if dtype is not None else [node.get("activation") or 0.0, 0.0, 0.0, 0.0]
        for node in nodes
    ]
    value, total, bias, omitted = (
        torch.tensor(column, dtype=wide) for column in zip(*exact, strict=True)
    )
    chance = [
        float(node.get("token_prob", 0.0)) if kind == LOGIT else 0.0
        for node, kind in zip(nodes, kinds, strict=True)
    ]
    return {
        "kind": torch.tensor(kinds, dtype=torch.uint8),
        "layer": torch.tensor(layer),
        "position": torch.tensor([node["ctx_idx"] for node in nodes]),
        "index": torch.tensor(index),
        "value": value,
        "total": total,
        "bias": bias,
        "omitted": omitted,
        "probability": torch.tensor(chance, dtype=wide),
    }


def _place(node: Mapping[str, Any], kind: int) -> tuple[int, int]:
    """Layer and index."""
    if kind == TOKEN:
        found = re.fullmatch(r"E_(\d{1,12})_\d+", node["node_id"], re.ASCII)
        return -1, int(found[1]) if found else -1
    layer = int(node["layer"])
    if kind == ERROR:
        return layer, -1
    if kind == FEATURE:
        return layer, int(node["node_id"].split("_")[1])
    vocabulary = node["feature"]
    if vocabulary is None or not 0 <= vocabulary < 1 << 53:
        raise CheckpointError(
            f"logit node {node['node_id']!r}: feature is {vocabulary}, expected a vocabulary id"
        )
    return max(layer - 1, 0), target_index(vocabulary)  # the JSON counts the logits' layer from 1


def _canonical_order(tables: Mapping[str, Tensor]) -> Tensor:
    """This package's order: features by layer, position and index; errors; tokens; logits as
    they come (the first is the target)."""
    n = len(tables["kind"])
    order = torch.arange(n)
    logits = tables["kind"] == LOGIT
    for name in ("index", "position", "layer"):
        key = torch.where(logits, torch.zeros_like(tables[name]), tables[name])
        order = order[key[order].argsort(stable=True)]
    return order[tables["kind"][order].argsort(stable=True)]


# -- the rest of the graph -----------------------------------------------------------------------


def _own_record(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What this package wrote beside the format, or None.

    Raises:
        CheckpointError: It is damaged.
    """
    own = data["metadata"].get(OWN_KEY)
    if own is None:
        return None
    texts, n_tokens = ("tokens", "target_names"), len(data["metadata"]["prompt_tokens"])
    sound = (
        isinstance(own, dict)
        and own.get("version") == OWN_VERSION
        and own.get("dtype") in ("float32", "float64")
        and isinstance(own.get("metadata"), dict)
        and all(_is_list(own.get(name), str) for name in texts)
        and _is_list(own.get("token_ids"), int)
        and len(own["tokens"]) == len(own["token_ids"]) == n_tokens
        and all(_is_numbers(node.get(OWN_KEY)) for node in data["nodes"])
    )
    logits = sum(node["feature_type"] == "logit" for node in data["nodes"])
    if not sound or len(own["target_names"]) != logits:
        raise CheckpointError(
            f"the file's {OWN_KEY!r} records are damaged, edited or of a newer version: remove "
            "them (from metadata and nodes) to read the rest"
        )
    return own


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(one) in (int, float) and abs(one) < 1e300 for one in value)
    )


def _tokens(metadata: Mapping[str, Any], own: Mapping[str, Any] | None) -> tuple[str, ...]:
    if own is not None:
        return tuple(own["tokens"])
    return tuple(restored(token) for token in metadata["prompt_tokens"])


def _token_ids(
    metadata: Mapping[str, Any], tables: Mapping[str, Tensor], own: Mapping[str, Any] | None
) -> tuple[int, ...]:
    """From the embedding nodes' ids; -1 where a position has none."""
    if own is not None:
        return tuple(own["token_ids"])
    ids = [-1] * len(metadata["prompt_tokens"])
    tokens = tables["kind"] == TOKEN
    places = zip(tables["position"][tokens].tolist(), tables["index"][tokens].tolist(), strict=True)
    for position, token in places:
        ids[position] = token
    return tuple(ids)


def _target_names(
    nodes: Sequence[Mapping[str, Any]], own: Mapping[str, Any] | None
) -> tuple[str, ...]:
    if own is not None:
        return tuple(own["target_names"])
    labels = [node["clerp"] for node in nodes if node["feature_type"] == "logit"]
    found = [_LOGIT_TEXT.fullmatch(label) for label in labels]
    names = [m[1] if m else label for m, label in zip(found, labels, strict=True)]
    return tuple(restored(name) for name in names)


def _metadata(
    data: Mapping[str, Any], own: Mapping[str, Any] | None, n_layers: int
) -> dict[str, Any]:
    if own is not None:
        return dict(own["metadata"])
    about = {k: v for k, v in data["metadata"].items() if k not in ("prompt_tokens", OWN_KEY)}
    pruning = about.get("pruning_settings") or {}
    if not pruning and about.get("node_threshold") is not None:
        pruning = {"node_threshold": about["node_threshold"]}
    return {
        "n_layers": n_layers,
        "model": about["scan"],
        "totals": NOT_RECORDED,
        "pruning": pruning,
        "graph_json": about,
    }


def _with_names(
    graph: AttributionGraph,
    data: Mapping[str, Any],
    nodes: Sequence[Mapping[str, Any]],
    own: Mapping[str, Any] | None,
) -> AttributionGraph:
    """Supernodes, pinned nodes and labels, as the file has them now."""
    number = {node["node_id"]: i for i, node in enumerate(nodes)}
    params, given = data["qParams"], {}
    pinned, groups = params.get("pinnedIds", []), params.get("supernodes", [])
    if [pinned, groups] != list(pinned_and_groups(graph)):  # edited since, or another's file
        named, taken = {}, {node.id for node in graph.nodes()}
        for name, *members in groups:
            unique = _unused(restored(name), taken)
            taken.add(unique)
            named[unique] = [number[i] for i in members]
        # Members of supernodes are pinned for the pages' sake only.
        inside = {i for members in named.values() for i in members}
        given["supernodes"] = named
        given["pinned"] = [number[i] for i in pinned if number[i] not in inside]
    labels = dict(graph.metadata.get("labels", {}))
    for node, written in zip(graph.nodes(), nodes, strict=True):
        theirs = own is None and node.kind != "feature"  # made by the writer, of the token
        if written["clerp"] != label_of(graph, node) and not theirs:
            labels[node.id] = restored(written["clerp"])
    if labels != graph.metadata.get("labels", {}):
        given["labels"] = labels
    return graph.named(**given) if given else graph


def _unused(name: str, taken: set[str]) -> str:
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name} ({count})"
    return found

"""``validate_graph``: whether a graph JSON is what Neuronpedia and circuit-tracer's pages take.

Three layers of rules: the published schema (which keys, of which types), what makes it a graph
(unique ids, links between nodes that exist and that point up), and the unwritten rules of each
page, found by running it. Every finding names the node or link and says what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from nnsight_transcoders.errors import CheckpointError

from .names import KIND_OF_TYPE, cantor

Target = Literal["any", "neuronpedia", "circuit-tracer"]
#: At most so many findings are listed in one error.
MAX_LISTED = 20

_NUMBER, _TEXT, _LIST, _DICT = (int, float), (str,), (list,), (dict,)
#: Key -> (types, compulsory). A key that is not listed may hold anything.
_TOP = {
    "metadata": (_DICT, True),
    "qParams": (_DICT, True),
    "nodes": (_LIST, True),
    "links": (_LIST, True),
}
_METADATA = {
    "slug": (_TEXT, True),
    "scan": (_TEXT, True),
    "prompt_tokens": (_LIST, True),
    "prompt": (_TEXT, True),
    "node_threshold": ((*_NUMBER, type(None)), False),
    "schema_version": ((int, type(None)), False),
    "feature_details": (_DICT, False),
    "info": (_DICT, False),
    "generation_settings": (_DICT, False),
    "pruning_settings": (_DICT, False),
    "transcoder_list": (_LIST, False),
}
_QPARAMS = {
    "pinnedIds": (_LIST, False),
    "supernodes": (_LIST, False),
    "linkType": (_TEXT, False),
    "clickedId": (_TEXT, False),
    "sg_pos": (_TEXT, False),
}
_NODE = {
    "node_id": (_TEXT, True),
    "feature": ((int, type(None)), True),
    "layer": ((str, int), True),
    "ctx_idx": ((int,), True),
    "feature_type": (_TEXT, True),
    "jsNodeId": (_TEXT, True),
    "clerp": (_TEXT, True),
    "influence": ((*_NUMBER, type(None)), False),
    "activation": ((*_NUMBER, type(None)), False),
    "token_prob": (_NUMBER, False),
    "is_target_logit": ((bool,), False),
}
_LINK = {"source": (_TEXT, True), "target": (_TEXT, True), "weight": (_NUMBER, True)}
_FEATURE_DETAILS = ("feature_json_base_url", "neuronpedia_source_set")


def validate_graph(data: Any, target: Target = "any") -> None:
    """Check a graph JSON.

    Args:
        data: What ``json.load`` gave.
        target: ``"any"``: the schema, and that it is a graph; ``"neuronpedia"`` or
            ``"circuit-tracer"``: also what that page needs.

    Raises:
        CheckpointError: It is not; the message lists up to 20 findings, each with its remedy.
    """
    found: list[str] = []
    more = 0
    for problem in graph_problems(data, target):
        if len(found) < MAX_LISTED:
            found.append(problem)
        else:
            more += 1
    if found:
        rest = f"\n  ... and {more} more" if more else ""
        lines = "\n  ".join(found)
        raise CheckpointError(
            f"this is no graph JSON that {_reader(target)} takes:\n  {lines}{rest}"
        )


def _reader(target: Target) -> str:
    names = {"any": "this package", "neuronpedia": "Neuronpedia", "circuit-tracer": target}
    return names[target]


def graph_problems(data: Any, target: Target = "any") -> Iterator[str]:
    """The findings of ``validate_graph`` one by one; any of the schema keep the others away."""
    schema = list(_schema_problems(data))
    yield from schema
    if schema:
        return
    yield from _structure_problems(data)
    if target == "neuronpedia":
        yield from _neuronpedia_problems(data)
    if target == "circuit-tracer":
        yield from _circuit_tracer_problems(data)
    if target != "any":
        yield from _page_problems(data)


# -- the schema ----------------------------------------------------------------------------------


def _schema_problems(data: Any) -> Iterator[str]:
    if not isinstance(data, dict):
        yield f"the top level is a {type(data).__name__}, expected an object"
        return
    top = list(_key_problems(data, _TOP, "the top level"))
    yield from top
    if top:
        return
    yield from _key_problems(data["metadata"], _METADATA, "metadata")
    tokens = data["metadata"].get("prompt_tokens")
    if isinstance(tokens, list) and not all(isinstance(token, str) for token in tokens):
        yield "metadata.prompt_tokens: every token must be text"
    yield from _key_problems(data["qParams"], _QPARAMS, "qParams")
    yield from _group_problems(data["qParams"])
    for i, node in enumerate(data["nodes"]):
        yield from _key_problems(node, _NODE, _node_name(node, i))
    for i, link in enumerate(data["links"]):
        yield from _key_problems(link, _LINK, _link_name(link, i))


def _key_problems(
    found: Any, keys: Mapping[str, tuple[tuple[type, ...], bool]], where: str
) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where} is a {type(found).__name__}, expected an object"
        return
    for key, (types, compulsory) in keys.items():
        if key not in found:
            if compulsory:
                yield f"{where} has no {key!r}: add it ({_names(types)})"
            continue
        value = found[key]
        wrong = isinstance(value, bool) and bool not in types
        if wrong or not isinstance(value, types):
            yield f"{where}: {key} is {_shown(value)}, expected {_names(types)}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where}: {key} is {value}, which JSON does not have: leave the key or node out"


def _group_problems(params: Mapping[str, Any]) -> Iterator[str]:
    pinned, groups = params.get("pinnedIds"), params.get("supernodes")
    if isinstance(pinned, list) and not all(isinstance(one, str) for one in pinned):
        yield "qParams.pinnedIds: every entry must be a node id"
    for i, group in enumerate(groups if isinstance(groups, list) else []):
        texts = isinstance(group, list) and all(isinstance(one, str) for one in group)
        if not texts or len(group) < 2:
            yield f"qParams.supernodes[{i}] must be [label, node id, ...], got {_shown(group)}"


# -- a graph -------------------------------------------------------------------------------------


def _structure_problems(data: Mapping[str, Any]) -> Iterator[str]:
    n_positions = len(data["metadata"]["prompt_tokens"])
    layers: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for i, node in enumerate(data["nodes"]):
        where, name = _node_name(node, i), node["node_id"]
        if name in layers:
            yield (
                f"{where}: node {name!r} is there twice. Ids must be unique; circuit-tracer's "
                "error nodes '0_{layer}_{position}' collide with layer 0's features: name them "
                "'{layer}_error_mlp_{position}', or read the graph's .pt file instead"
            )
        kind = KIND_OF_TYPE.get(node["feature_type"])
        if kind is None:
            known = ", ".join(map(repr, KIND_OF_TYPE))
            yield f"{where}: unknown feature_type {node['feature_type']!r}; known: {known}"
            continue
        layer = _layer(node, kind)
        if layer is None:
            yield f"{where}: layer {node['layer']!r} is no number (or 'E' for an embedding)"
            continue
        layers[name], kinds[name] = layer, kind
        if not 0 <= node["ctx_idx"] < n_positions:
            yield (
                f"{where}: ctx_idx {node['ctx_idx']} is outside the prompt's {n_positions} tokens"
            )
        if kind == "feature":
            yield from _feature_problems(node, where)
    if "logit" not in kinds.values():
        yield "there is no logit node: a graph explains at least one"
    yield from _link_problems(data, layers, kinds)
    named = [("pinnedIds", one) for one in data["qParams"].get("pinnedIds", [])]
    for group in data["qParams"].get("supernodes", []):
        named += [(f"supernode {group[0]!r}", one) for one in group[1:]]
    for where, name in named:
        if name not in layers:
            yield f"qParams, {where}: there is no node {name!r}: leave it out"


def _layer(node: Mapping[str, Any], kind: str) -> int | None:
    """A node's layer as a number; -1 for embeddings."""
    if kind == "token":
        return -1
    text = str(node["layer"])
    return int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else None


def _feature_problems(node: Mapping[str, Any], where: str) -> Iterator[str]:
    parts = re.fullmatch(r"(\d{1,6})_(\d{1,12})_(\d{1,9})", node["node_id"], re.ASCII)
    if parts is None:
        yield f"{where}: a feature's node_id is '{{layer}}_{{feature}}_{{position}}'"
        return
    layer, feature, position = map(int, parts.groups())
    if str(layer) != str(node["layer"]) or position != node["ctx_idx"]:
        yield (
            f"{where}: node_id says layer {layer}, position {position}; layer and ctx_idx say "
            f"{node['layer']}, {node['ctx_idx']}"
        )
    if node["feature"] is None or node["feature"] < 0:
        yield f"{where}: feature is {node['feature']}, expected {cantor(layer, feature)}"


def _link_problems(
    data: Mapping[str, Any], layers: Mapping[str, float], kinds: Mapping[str, str]
) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    known = {node["node_id"] for node in data["nodes"]}
    for i, link in enumerate(data["links"]):
        where, ends = _link_name(link, i), (link["source"], link["target"])
        missing = [end for end in ends if end not in known]
        if missing:
            yield f"{where}: there is no node {missing[0]!r}: add it, or leave the link out"
            continue
        if ends in seen:
            yield f"{where}: this link is there twice: add up the weights"
        seen.add(ends)
        if any(end not in layers for end in ends):
            continue  # reported with the node
        source, target = ends
        if kinds[target] in ("error", "token"):
            yield f"{where}: a node of type {kinds[target]} has no inputs: leave the link out"
        elif layers[source] >= layers[target]:
            yield (
                f"{where}: it goes from layer {layers[source]} to layer {layers[target]}; links "
                "point to a higher layer"
            )


# -- what the pages need -------------------------------------------------------------------------


def _page_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Rules that both pages have and neither writes down."""
    highest = -1
    threshold = data["metadata"].get("node_threshold")
    for i, node in enumerate(data["nodes"]):
        kind, where = KIND_OF_TYPE.get(node["feature_type"]), _node_name(node, i)
        if kind == "logit":
            if node["clerp"] and not re.search(r"\(p=\d*\.?\d+(e-?\d+)?\)", node["clerp"]):
                yield f"{where}: a logit's clerp must contain its probability as '(p=0.123)'"
            if "token_prob" not in node:
                yield f"{where}: a logit needs token_prob, from which the scores are computed"
        elif kind in ("feature", "error"):
            highest = max(highest, _layer(node, kind) or 0)
            if threshold is not None and node.get("influence") is None:
                yield (
                    f"{where}: metadata.node_threshold is set, so features and errors need "
                    "influence (the cumulative share after sorting; low is important)"
                )
    if highest == 0:
        yield (
            "no node but logits is above layer 0, which the pages take for 'no layer at all': "
            "export with a higher node threshold, so that later layers' nodes stay"
        )


def _neuronpedia_problems(data: Mapping[str, Any]) -> Iterator[str]:
    metadata = data["metadata"]
    for key in ("scan", "slug"):
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", metadata[key], re.ASCII):
            hint = " (a model id of Neuronpedia, such as 'gemma-2-2b', no Hub id)"
            yield (
                f"metadata.{key} is {metadata[key]!r}: letters, digits, '_', '.' and '-' only"
                f"{hint if key == 'scan' else ''}"
            )
    details = metadata.get("feature_details", {})
    for key in _FEATURE_DETAILS:
        if key in details and not isinstance(details[key], str):
            yield f"metadata.feature_details.{key} must be text"
    base = details.get("feature_json_base_url")
    if base is not None and metadata.get("schema_version") == 1:
        yield (
            "metadata.feature_details.feature_json_base_url is not read when schema_version is 1: "
            "leave schema_version out"
        )


def _circuit_tracer_problems(data: Mapping[str, Any]) -> Iterator[str]:
    if "transcoder_list" not in data["metadata"]:
        yield "metadata has no 'transcoder_list': add it (a list, which may be empty)"
    for key in _QPARAMS:
        if key not in data["qParams"]:
            yield f"qParams has no {key!r}: add it (it may be empty)"
    if len(data["metadata"]["prompt_tokens"]) < 2:
        yield "circuit-tracer's page hides every node of a prompt of one token"
    for i, node in enumerate(data["nodes"]):
        if not isinstance(node["layer"], str):
            yield f"{_node_name(node, i)}: layer must be text for circuit-tracer"
        if node["feature"] is None:
            yield f"{_node_name(node, i)}: feature must be a number for circuit-tracer"


# -- messages ------------------------------------------------------------------------------------


def _node_name(node: Any, i: int) -> str:
    name = node.get("node_id") if isinstance(node, dict) else None
    return f"nodes[{i}]" + (f" ({_shown(name)})" if isinstance(name, str) else "")


def _link_name(link: Any, i: int) -> str:
    if not isinstance(link, dict):
        return f"links[{i}]"
    ends = [link.get("source"), link.get("target")]
    if not all(isinstance(end, str) for end in ends):
        return f"links[{i}]"
    return f"links[{i}] ({_shown(ends[0])} -> {_shown(ends[1])})"


def _names(types: tuple[type, ...]) -> str:
    known = {
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        type(None): "null",
    }
    wanted = [t for t in types if not (t is int and float in types)]
    return " or ".join(known[t] for t in wanted)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

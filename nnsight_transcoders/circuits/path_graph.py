"""Paths as an ``AttributionGraph``, so that pruning, saving and the page work on them.

Nodes are the features, errors and tokens that the paths touch, and their root; the attention heads
and skip paths between two of them are summed into the edge. An edge is in units of its own target,
not of the root: each node is taken apart once more with its own vector, so that a segment which
occurs under several beginnings counts once and nothing has to be divided.

Every target closes as in ``attribute``'s graphs. ``bias`` is what the constant terms alone give,
from a run of the frozen model with all sources at zero; ``omitted`` is what no path followed.

Legend: D d_model, T positions, H heads, S source positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.transcoder import dtype_name

from .contributions import CircuitRun
from .feature_vectors import Contribution, FeatureVector
from .graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph
from .paths import Key, Path, key_of

#: What followed components lead to; only attention and skip steps have any.
Followed = dict[Key, "Followed"]

_NODE_KINDS = {"feature": FEATURE, "error": ERROR, "token": TOKEN}


def path_graph(
    circuit: CircuitRun, target: FeatureVector, paths: Sequence[Path]
) -> AttributionGraph:
    """The graph of some paths.

    Args:
        circuit: The run.
        target: The target the paths were found for; its node is the graph's one logit node, also
            where it is a feature.
        paths: From ``top_paths``.

    Returns:
        A graph with the nodes that the paths touch. A feature that a path only reached is a node
        without incoming edges, all of whose input is ``omitted`` or ``bias``.

    Of a remote model, this asks for all attention maps (``CircuitRun.with_maps``), unless the
    client can read them: what closes a node are the constants that every head moves.

    Raises:
        InputError: No paths, or a path of another target or run.
    """
    if not paths:
        raise InputError("there are no paths: top_paths() found none, or a query left none")
    for path in paths:
        if path.root != target.name:
            raise InputError(f"a path leads to {path.root!r}, but the target is {target.name!r}")
    circuit = circuit.with_maps()
    constants = _Constants.of(circuit)
    rows = {
        node: _row(circuit, constants, target if node is None else _vector(circuit, node), followed)
        for node, followed in _followed(paths).items()
    }
    touched = {source for row in rows.values() for source in row.edges} | rows.keys() - {None}
    ordered = sorted((node for node in touched if node is not None), key=_order)
    return _assemble(circuit, target, ordered, rows, len(paths))


def _followed(paths: Sequence[Path]) -> dict[Key | None, Followed]:
    """Per node (None: the root) what was followed from it, up to the next nodes."""
    found: dict[Key | None, Followed] = {None: {}}
    for path in paths:
        here = found[None]
        for step in path.steps:
            key = key_of(step)
            below = here.setdefault(key, {})
            here = found.setdefault(key, {}) if step.kind == "feature" else below
    return found


def _order(key: Key) -> tuple[int, int, int, int]:
    return (_NODE_KINDS[key[0]], *key[1:])


def _vector(circuit: CircuitRun, key: Key) -> FeatureVector:
    _, layer, position, index = key
    return circuit.feature(layer, index, position)


# -- one row -------------------------------------------------------------------------------------


@dataclass
class _Row:
    """What flows into one node, in its own units."""

    total: float
    bias: float
    omitted: float = 0.0
    edges: dict[Key, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Constants:
    """The residual stream ``(T, D)`` of a run without features, errors and tokens: what position
    embeddings, decoders' and attention's biases and norms' biases alone give.

    Attributes:
        before: Per layer, before its attention; at last, at the final norm.
        after: Per layer, after its attention.
    """

    before: list[Tensor]
    after: list[Tensor]

    @classmethod
    def of(cls, circuit: CircuitRun) -> _Constants:
        """Run it."""
        frozen, position = circuit.frozen, circuit.run.position_embedding
        stream = torch.zeros_like(circuit.run.final, dtype=frozen.final_norm.gain.dtype)
        if position is not None:
            stream = stream + position.to(stream.dtype)
        before, after = [stream], []
        for layer, bias in zip(frozen.layers, circuit.active.bias, strict=True):
            after.append(stream + layer.attend(stream, constants=True))
            read = stream if frozen.parallel else after[-1]
            if layer.read is not None:
                read = layer.read.forward(read)
            out = torch.zeros_like(stream) if bias is None else bias.expand_as(stream)
            if layer.skip is not None:
                out = out + read @ layer.skip.T.to(read.dtype)
            stream = after[-1] + (out if layer.write is None else layer.write.forward(out))
            before.append(stream)
        return cls(before, after)

    def at(self, target: FeatureVector) -> Tensor:
        """``(D,)`` where a target reads."""
        more = target.n_attention > target.n_mlp
        return (self.after if more else self.before)[target.n_mlp][target.position]


def _row(
    circuit: CircuitRun, constants: _Constants, target: FeatureVector, followed: Followed
) -> _Row:
    bias = float(constants.at(target) @ target.vector) + target.constant
    row = _Row(circuit.total(target), bias)
    _walk(circuit, constants, target, followed, row)
    return row


def _walk(
    circuit: CircuitRun,
    constants: _Constants,
    target: FeatureVector,
    followed: Followed,
    row: _Row,
) -> None:
    """Add what flows into ``target`` to a row, but for what is constant."""
    if not followed:
        row.omitted += circuit.total(target) - target.constant
        row.omitted -= float(constants.at(target) @ target.vector)
        return
    found = {key_of(c): c for c in circuit.contributions(target)}
    if missing := followed.keys() - found.keys():
        raise InputError(f"{sorted(missing)[0]} does not contribute here: a path of another run")
    for key, one in found.items():
        if one.kind in ("bias", "position"):
            continue
        if key not in followed:
            row.omitted += one.value
        elif one.kind in _NODE_KINDS:
            row.edges[key] = row.edges.get(key, 0.0) + one.value
        else:
            _walk(circuit, constants, circuit.extend(target, one), followed[key], row)
    row.omitted -= _constant_part(circuit, constants, target, followed)


def _constant_part(
    circuit: CircuitRun, constants: _Constants, target: FeatureVector, followed: Followed
) -> float:
    """What heads and skip paths that were not followed move of the constants into a target."""
    total, frozen = 0.0, circuit.frozen
    for layer in range(target.n_attention):
        terms = frozen.folded[layer].head_terms(
            target.vector, target.position, constants.before[layer]
        )
        for kind, at, position, head in followed:
            if kind == "attention" and at == layer:
                terms[head, position] = 0.0
        total += float(terms.sum())
    for layer in range(target.n_mlp):
        if frozen.layers[layer].skip is not None:
            one = Contribution("skip", layer, target.position, -1, 0.0)
            if key_of(one) not in followed:
                below = circuit.extend(target, one)
                total += float(constants.at(below) @ below.vector)
    return total


# -- the tables ----------------------------------------------------------------------------------


def _assemble(
    circuit: CircuitRun,
    target: FeatureVector,
    nodes: list[Key],
    rows: dict[Key | None, _Row],
    n_paths: int,
) -> AttributionGraph:
    """Nodes in order, the root last."""
    dtype = circuit.frozen.final_norm.gain.dtype
    numbers: dict[Key | None, int] = {key: i for i, key in enumerate(nodes)} | {None: len(nodes)}
    edges = [
        (numbers[source], numbers[node], value)
        for node, row in rows.items()
        for source, value in row.edges.items()
        if value
    ]
    ends = torch.tensor([edge[:2] for edge in edges], dtype=torch.long).reshape(-1, 2)
    per_target = {name: torch.zeros(len(numbers), dtype=dtype) for name in _ROW_FIELDS}
    for node, row in rows.items():
        for name in _ROW_FIELDS:
            per_target[name][numbers[node]] = getattr(row, name)
    probability = torch.zeros(len(numbers), dtype=dtype)
    if target.token_id >= 0:
        probability[-1] = circuit.run.probabilities[target.position, target.token_id]
    return AttributionGraph(
        **_node_table(circuit, target, nodes, dtype),
        **per_target,
        source=ends[:, 0].contiguous(),
        target=ends[:, 1].contiguous(),
        weight=torch.tensor([edge[2] for edge in edges], dtype=dtype),
        probability=probability,
        tokens=circuit.token_texts,
        token_ids=tuple(circuit.run.token_ids.tolist()),
        target_names=(target.name,),
        metadata=_metadata(circuit, dtype, n_paths),
    )


_ROW_FIELDS = ("total", "bias", "omitted")


def _node_table(
    circuit: CircuitRun, target: FeatureVector, nodes: list[Key], dtype: torch.dtype
) -> dict[str, Tensor]:
    ids, columns = circuit.run.token_ids.tolist(), []
    for kind, layer, position, index in nodes:
        named = ids[position] if kind == "token" else index
        columns.append((_NODE_KINDS[kind], layer, position, named))
    columns.append((LOGIT, circuit.frozen.n_layers, target.position, target.token_id))
    kind, layer, position, index = torch.tensor(columns).T
    value = [_value(circuit, key) for key in nodes]
    if target.token_id < 0:
        value.append(circuit.total(target))
    else:
        value.append(float(circuit.run.logits[target.position, target.token_id]))
    return {
        "kind": kind.to(torch.uint8),
        "layer": layer.contiguous(),
        "position": position.contiguous(),
        "index": index.contiguous(),
        "value": torch.tensor(value, dtype=dtype),
    }


def _value(circuit: CircuitRun, key: Key) -> float:
    """A feature's activation, or the norm of an error or token."""
    kind, layer, position, index = key
    if kind == "token":
        return float(circuit.run.embedding[position].double().norm())
    if kind == "error":
        return float(circuit.active.error[layer][position].norm())
    active = circuit.active.layers[layer]
    return float(active.activation[(active.position == position) & (active.index == index)])


def _metadata(circuit: CircuitRun, dtype: torch.dtype, n_paths: int) -> dict[str, Any]:
    return {
        "n_layers": circuit.frozen.n_layers,
        "method": "paths",
        "attribution_dtype": dtype_name(dtype),
        "transcoder_layers": sorted(circuit.active.layers),
        "settings": {"n_paths": n_paths},
        "versions": {"nnsight-transcoders": __version__},
    }

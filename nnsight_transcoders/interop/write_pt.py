"""A graph as circuit-tracer's ``.pt`` file: the same bytes as its own ``Graph.to_pt`` would write.

The names of its classes are in the file (``torch_write.py``), which need not be installed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.circuits.graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph
from nnsight_transcoders.errors import InputError

from .graph_pt import CONFIG_CLASS, TARGET_CLASS
from .torch_write import Instance, New, write_torch_file

#: Largest dense matrix that is written, in elements: 16,384 nodes, 1 GiB.
MAX_ELEMENTS = 2**28
_SIZES = ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab")


def write_graph_pt(
    graph: AttributionGraph,
    path: Path,
    *,
    scan: str | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """See ``AttributionGraph.to_circuit_tracer``."""
    n_layers, n_positions = graph.n_layers, len(graph.token_ids)
    if any(i < 0 for i in graph.token_ids):
        raise InputError("the graph's token ids are not all known, which a .pt graph needs")
    if not len(graph.of_kind("logit")):
        raise InputError("the graph has no logit nodes")
    features, logits = graph.of_kind("feature"), graph.of_kind("logit")
    n_nodes = len(features) + (n_layers + 1) * n_positions + len(logits)
    if n_nodes**2 > MAX_ELEMENTS:
        raise InputError(
            f"circuit-tracer's file holds all pairs of the {n_nodes} nodes, "
            f"{n_nodes**2 * 4 / 2**30:.1f} GiB: prune the graph first"
        )
    known = _config(graph, config or {})
    number = _numbers(graph, len(features), n_layers, n_positions)
    adjacency = torch.zeros(n_nodes, n_nodes)
    adjacency[number[graph.target], number[graph.source]] = graph.weight.float()
    table = torch.stack([graph.layer[features], graph.position[features], graph.index[features]], 1)
    ids = [int(i) if i >= 0 else known["d_vocab"] - 1 - int(i) for i in graph.index[logits]]
    content = {
        "input_string": graph.metadata.get("prompt") or "".join(graph.tokens),
        "adjacency_matrix": adjacency,
        "cfg": Instance(*CONFIG_CLASS, state=known),
        "active_features": table,
        "logit_targets": [
            New(*TARGET_CLASS, arguments=(name, i))
            for name, i in zip(graph.target_names, ids, strict=True)
        ],
        "logit_probabilities": graph.probability[logits].float(),
        "vocab_size": known["d_vocab"],
        "input_tokens": torch.tensor(graph.token_ids),
        "selected_features": torch.arange(len(features)),
        "activation_values": graph.value[features].float(),
        "scan": scan or graph.metadata.get("circuit_tracer", {}).get("scan"),
    }
    with atomic_path(path) as partial:
        write_torch_file(content, partial)
    return path


def _config(graph: AttributionGraph, given: dict[str, Any]) -> dict[str, Any]:
    """circuit-tracer's config of the model; numbers that are not known are 0.

    Its own code reads the number of layers, the vocabulary size and the tokenizer's name.
    """
    before = graph.metadata.get("circuit_tracer", {}).get("config", {})
    model = str(graph.metadata.get("model", ""))
    numbers = dict.fromkeys(_SIZES, 0)
    names = {"tokenizer_name": model, "model_name": model}
    names["original_architecture"] = str(graph.metadata.get("architecture", ""))
    known: dict[str, Any] = {
        **numbers,
        **names,
        "n_key_value_heads": None,
        "dtype": None,
        "d_vocab": graph.metadata.get("vocab_size", 0),
        "d_model": graph.metadata.get("d_model", 0),
        **{key: value for key, value in before.items() if key in (*numbers, *names)},
    }
    unknown = set(given) - set(known)
    if unknown:
        raise InputError(f"config has no {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    known.update(given)
    known["n_layers"] = graph.n_layers
    highest = max(int(graph.index[graph.kind == LOGIT].max()), max(graph.token_ids))
    known["d_vocab"] = max(known["d_vocab"], highest + 1)
    return known


def _numbers(graph: AttributionGraph, n_features: int, n_layers: int, n_positions: int) -> Tensor:
    """Each node's number in circuit-tracer's order."""
    number = torch.zeros(graph.n_nodes, dtype=torch.long)
    first_token = n_features + n_layers * n_positions
    number[graph.kind == FEATURE] = torch.arange(n_features)
    error, token = graph.kind == ERROR, graph.kind == TOKEN
    number[error] = n_features + graph.layer[error] * n_positions + graph.position[error]
    number[token] = first_token + graph.position[token]
    n_logits = int((graph.kind == LOGIT).sum())
    number[graph.kind == LOGIT] = first_token + n_positions + torch.arange(n_logits)
    return number

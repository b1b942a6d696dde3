"""From edge rows to an ``AttributionGraph``: features, errors, tokens, then targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .candidates import Candidates
from .graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph


def assemble(
    candidates: Candidates,
    rows: Tensor,
    expanded: Tensor,
    tokens: tuple[str, ...],
    metadata: dict[str, Any],
) -> AttributionGraph:
    """Build the graph.

    Args:
        candidates: The candidate nodes.
        rows: ``(G + n, C)`` edge rows, the G targets first (see ``expand``).
        expanded: ``(n,)`` numbers of the features that become nodes.
        tokens: The prompt's tokens as text.
        metadata: JSON-ready record.
    """
    n_targets = len(candidates.chosen.names)
    order = expanded.argsort()
    features = expanded[order]
    rows = torch.cat([rows[n_targets:][order.cpu()], rows[:n_targets]])
    others = torch.arange(candidates.n_features, candidates.n_columns)
    kept = torch.cat([features.cpu(), others])
    inside = rows[:, kept]
    omitted = torch.zeros(len(rows), dtype=rows.dtype)
    if len(features) < candidates.n_features:
        left_out = torch.ones(candidates.n_columns, dtype=torch.bool)
        left_out[kept] = False
        omitted = rows[:, left_out].sum(1)
    n_nodes = len(kept) + n_targets
    targets = torch.cat([torch.arange(len(features)), torch.arange(len(kept), n_nodes)])
    row, column = inside.nonzero(as_tuple=True)
    total, bias = _totals(candidates, features)
    per_target = {
        name: torch.zeros(n_nodes, dtype=rows.dtype).index_copy(0, targets, values.cpu())
        for name, values in (("total", total), ("bias", bias), ("omitted", omitted))
    }
    return AttributionGraph(
        **_node_table(candidates, features),
        **per_target,
        source=column,
        target=targets[row],
        weight=inside[row, column],
        tokens=tokens,
        token_ids=tuple(candidates.run.token_ids.tolist()),
        target_names=candidates.chosen.names,
        metadata=metadata,
    )


def _node_table(candidates: Candidates, features: Tensor) -> dict[str, Tensor]:
    """kind, layer, position, index, value and probability of all nodes, ``(N,)`` each."""
    n_positions, n_layers = candidates.run.n_positions, candidates.n_layers
    chosen, dtype = candidates.chosen, candidates.dtype
    everywhere, every_layer = torch.arange(n_positions), torch.arange(n_layers)
    at_targets = candidates.logit_targets()
    errors = torch.stack([error.norm(dim=-1) for error in candidates.active.error]).flatten()
    table = {
        "kind": [
            torch.full((n,), kind, dtype=torch.uint8)
            for kind, n in (
                (FEATURE, len(features)),
                (ERROR, n_layers * n_positions),
                (TOKEN, n_positions),
                (LOGIT, len(chosen.names)),
            )
        ],
        "layer": [
            candidates.layer[features],
            every_layer.repeat_interleave(n_positions),
            torch.full((n_positions,), -1),
            at_targets.layer,
        ],
        "position": [
            candidates.positions[features],
            everywhere.repeat(n_layers),
            everywhere,
            at_targets.position,
        ],
        "index": [
            candidates.gather(features, "index"),
            torch.full((n_layers * n_positions,), -1),
            candidates.run.token_ids,
            chosen.index,
        ],
        "value": [
            candidates.gather(features, "activation"),
            errors,
            candidates.run.embedding.to(dtype).norm(dim=-1),
            chosen.value,
        ],
        "probability": [
            torch.zeros(len(features) + (n_layers + 1) * n_positions, dtype=dtype),
            chosen.probability,
        ],
    }
    return {name: torch.cat([part.cpu() for part in parts]) for name, parts in table.items()}


def _totals(candidates: Candidates, features: Tensor) -> tuple[Tensor, Tensor]:
    """What the inputs of each target sum to, and its constant terms: features, then targets."""
    bias = candidates.gather(features, "encoder_bias")
    for layer, here, rows in candidates.by_layer(features):
        active = candidates.active.layers[layer]
        constant = candidates.constants[layer][active.position[rows]]
        bias[here] += (active.encoder[rows] * constant).sum(-1)
    chosen = candidates.chosen
    constant = candidates.final_constants[candidates.position]
    totals = torch.cat([candidates.gather(features, "pre_activation"), chosen.total])
    return totals, torch.cat([bias, chosen.direction @ constant + chosen.bias])

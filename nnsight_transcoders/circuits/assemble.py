"""From edge rows to an ``AttributionGraph``: features, errors, tokens, then targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .candidates import Candidates
from .edge_table import EdgeTable
from .graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph


def assemble(
    candidates: Candidates, table: EdgeTable, tokens: tuple[str, ...], metadata: dict[str, Any]
) -> AttributionGraph:
    """Build the graph.

    Args:
        candidates: The candidate nodes.
        table: Their edges (``edge_table``).
        tokens: The prompt's tokens as text.
        metadata: JSON-ready record.
    """
    n_targets, n_sources = len(candidates.chosen.names), table.rows.shape[1]
    n_nodes, n_features = n_sources + n_targets, len(table.features)
    targets = torch.cat([torch.arange(n_features), torch.arange(n_sources, n_nodes)])
    row, column = table.rows.nonzero(as_tuple=True)
    per_target = {
        name: torch.zeros(n_nodes, dtype=table.rows.dtype).index_copy(
            0, targets, getattr(table, name)
        )
        for name in ("total", "bias", "omitted")
    }
    return AttributionGraph(
        **_node_table(candidates, table.features),
        **per_target,
        source=column,
        target=targets[row],
        weight=table.rows[row, column],
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

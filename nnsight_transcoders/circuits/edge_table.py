"""The edge rows of a graph cut to its nodes, and what each target's row sums to.

Torch only: it also runs in remote jobs, so that no more than the graph comes back from them.
Legend: G targets (logits), n features that become nodes, C columns, S = n + L * T + T sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Candidates

#: Rows copied at a time: they may be wide, and there is no need for a second copy of all of them.
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class EdgeTable:
    """The edges of a graph, on the CPU; targets are the n features, then the G targets.

    Attributes:
        features: ``(n,)`` numbers of the features that become nodes, in order.
        rows: ``(n + G, S)`` edges from the n features, the error nodes and the tokens.
        omitted: ``(n + G,)`` what features that are no nodes contribute.
        total: ``(n + G,)`` what each target's inputs sum to.
        bias: ``(n + G,)`` its constant terms.
    """

    features: Tensor
    rows: Tensor
    omitted: Tensor
    total: Tensor
    bias: Tensor


def edge_table(candidates: Candidates, rows: Tensor, expanded: Tensor) -> EdgeTable:
    """Cut the rows of ``expand`` to the graph's nodes.

    Args:
        candidates: The candidate nodes.
        rows: ``(G + n, C)`` edge rows, the G targets first.
        expanded: ``(n,)`` numbers of the features that become nodes.
    """
    n_targets = len(candidates.chosen.index)
    order = expanded.argsort()
    features = expanded[order]
    others = torch.arange(candidates.n_features, candidates.n_columns)
    kept = torch.cat([features.cpu(), others])
    left_out = torch.ones(candidates.n_columns, dtype=torch.bool)
    left_out[kept] = False
    table = rows.new_empty(len(rows), len(kept))
    omitted = rows.new_zeros(len(rows))
    place = torch.cat([n_targets + order.cpu(), torch.arange(n_targets)])
    for at in torch.arange(len(rows)).split(ROWS_AT_A_TIME):
        part = rows[place[at]]
        table[at] = part[:, kept]
        omitted[at] = part[:, left_out].sum(1)
    total, bias = totals(candidates, features)
    return EdgeTable(features, table, omitted, total.cpu(), bias.cpu())


def totals(candidates: Candidates, features: Tensor) -> tuple[Tensor, Tensor]:
    """What the inputs of each target sum to, and its constant terms: features, then targets."""
    bias = candidates.gather(features, "encoder_bias")
    for layer, here, rows in candidates.by_layer(features):
        active = candidates.active.layers[layer]
        constant = candidates.constants[layer][active.position[rows]]
        bias[here] += (active.encoder_of(rows) * constant).sum(-1)
    chosen = candidates.chosen
    constant = candidates.final_constants[candidates.position]
    totals = torch.cat([candidates.gather(features, "pre_activation"), chosen.total])
    return totals, torch.cat([bias, chosen.direction @ constant + chosen.bias])

"""What a graph predicts for an intervention, by its edges alone (torch only).

Multiplying a feature's activation by ``f`` changes what it writes by ``f - 1`` times what it was,
so each of its edges changes by ``(f - 1)`` times its weight. Where a feature is active its
activation is linear: one whose pre-activation changes by ``d`` from ``a`` writes ``d / a`` more of
what it wrote, and so on up to the logits. The prediction is the sum over all paths, and linear. A
feature that is held (``pinned``) passes nothing on.

Legend: M interventions, N nodes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .graph import AttributionGraph


def predicted_changes(
    graph: AttributionGraph, factors: Tensor, pinned: Collection[int] = ()
) -> Tensor:
    """The change of every target's pre-activation or logit.

    Args:
        graph: The graph; features that are not in it count as unchanged.
        factors: ``(M, N)`` what each feature's activation is multiplied by; NaN where it is left
            to follow.
        pinned: Layers whose features keep what they write.

    Returns:
        ``(M, N)`` in float64: of features that are multiplied, ``(f - 1)`` times their value; of
        pinned ones, what arrives at them; zero for nodes without inputs.
    """
    value = graph.value.double()
    weight = graph.weight.double()
    changed = ~factors.isnan()
    change = torch.where(changed, (factors.double() - 1) * value, 0.0)
    passed = torch.where(changed, factors.double() - 1, 0.0)
    held = torch.isin(graph.layer, torch.tensor(sorted(pinned), dtype=graph.layer.dtype))
    layer_of_edge = graph.layer[graph.target]
    for layer in sorted(set(graph.layer[graph.is_target].tolist())):
        edges = (layer_of_edge == layer).nonzero().flatten()
        incoming = torch.zeros_like(change)
        source, target = graph.source[edges], graph.target[edges]
        incoming.index_add_(1, target, passed[:, source] * weight[edges])
        here = (graph.layer == layer) & graph.is_target & ~changed
        change = torch.where(here, incoming, change)
        follows = here & ~held & (value != 0)
        passed = torch.where(follows, change / value, passed)
    return change


def path_sums(graph: AttributionGraph, target: int) -> Tensor:
    """Each node's total effect on one target: the sum over all paths ``(N,)``, in float64.

    Taking a feature away changes the frozen linear model's target by exactly minus this.
    """
    value, weight = graph.value.double(), graph.weight.double()
    reach = torch.zeros_like(value)
    reach[target] = 1.0
    total = torch.zeros_like(value)
    layer_of_edge = graph.layer[graph.target]
    others = graph.is_target & (value != 0)
    others[target] = False
    for layer in sorted(set(graph.layer[graph.is_target].tolist()), reverse=True):
        edges = layer_of_edge == layer
        total.index_add_(0, graph.source[edges], reach[graph.target[edges]] * weight[edges])
        reach = torch.where(others & (graph.layer < layer), total / value, reach)
    return total

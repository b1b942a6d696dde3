"""Predicted against measured effects of many nodes: how far a graph can be trusted.

Each feature is changed on its own, in the real model (``interventions.py``), and the change of one
target is put next to what the graph's edges predict. Two figures sum it up: how often the signs
agree, and Spearman's rank correlation. Two baselines say what they are worth: the feature's
activation alone, and chance.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .graph import FEATURE, LOGIT, AttributionGraph
from .grouping import NodeKey, number_of
from .intervention_measure import Mlps, measure


@dataclass(frozen=True)
class Agreement:
    """How well one column of numbers stands for another.

    Attributes:
        sign: Share of rows whose signs agree.
        spearman: Rank correlation, ties at their mean rank; NaN below two different values.
    """

    sign: float
    spearman: float


@dataclass(frozen=True, eq=False)
class EffectTable:
    """One row per feature; tensors ``(n,)`` in float64.

    Attributes:
        target: Name of the target whose change is measured.
        node: Node numbers in the graph.
        ids: Node ids.
        labels: Nodes as text.
        predicted: Change of the target by the graph's edges.
        measured: Change of the target in the model.
        activation: The features' activations on the prompt.
        influence: The features' influence on the graph's targets.
        factor: What each feature was multiplied by.
        settings: How it was measured, JSON-ready.
    """

    target: str
    node: tuple[int, ...]
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    predicted: Tensor
    measured: Tensor
    activation: Tensor
    influence: Tensor
    factor: float
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.node)

    @property
    def agreement(self) -> Agreement:
        """Of the graph's prediction with what was measured."""
        return agreement(self.predicted, self.measured)

    @property
    def baselines(self) -> dict[str, Agreement]:
        """The same for a feature's activation alone (times ``factor - 1``) and for chance."""
        chance = torch.randn(len(self), generator=torch.Generator().manual_seed(0)).double()
        return {
            "activation": agreement((self.factor - 1) * self.activation, self.measured),
            "random": agreement(chance, self.measured),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table as JSON-ready rows."""
        columns = {
            "node": self.node,
            "id": self.ids,
            "label": self.labels,
            "predicted": self.predicted.tolist(),
            "measured": self.measured.tolist(),
            "activation": self.activation.tolist(),
            "influence": self.influence.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __repr__(self) -> str:
        found, others = self.agreement, self.baselines
        lines = [
            f"EffectTable of {len(self)} features x{self.factor:g} on {self.target!r}: "
            f"sign agreement {found.sign:.2f}, Spearman {found.spearman:.2f} (activation "
            f"{others['activation'].spearman:.2f}, random {others['random'].spearman:.2f})",
            f"  {'predicted':>10} {'measured':>10}",
        ]
        order = self.measured.abs().argsort(descending=True)[:10].tolist()
        lines += [
            f"  {float(self.predicted[i]):>+10.4f} {float(self.measured[i]):>+10.4f}  "
            f"{self.labels[i]}"
            for i in order
        ]
        return "\n".join(lines)


def predicted_vs_measured(
    graph: AttributionGraph,
    model: Any,
    transcoders: TranscoderSet,
    *,
    nodes: Sequence[NodeKey] | None = None,
    top: int = 50,
    target: NodeKey | None = None,
    factor: float = 0.0,
    constrained: Collection[int] = (),
    freeze_attention: bool = True,
    mlps: Mlps = "model",
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> EffectTable:
    """Change each of some features on its own, and compare one target's change with the graph's.

    Args:
        graph: The graph; its own edges make the prediction.
        model: The nnsight model it was made with.
        transcoders: The set it was made with.
        nodes: Which nodes. Default: the most influential features of the graph once pruned (at the
            default thresholds, unless it is a pruned graph already).
        top: How many of those.
        target: A logit node, or a feature node above; default: the first logit, which is the most
            likely one.
        factor: What each feature's activation is multiplied by; 0 takes it away.
        constrained: See ``AttributionGraph.intervene``.
        freeze_attention: See there.
        mlps: See there.
        sites: See there.
        remote: The model is on a server (see there): one request, for the rows of the features
            that are changed and of the target; only its changes come back.

    Raises:
        InputError: No features, or a target that is not one.
        RemoteError: The server, or the job there, failed.
    """
    number = int(graph.of_kind("logit")[0]) if target is None else number_of(graph, target)
    if graph.kind[number] not in (FEATURE, LOGIT):
        raise InputError(f"{graph.label(number)} has no inputs: a target is a feature or a logit")
    if nodes is None:
        numbers = [n for n in top_features(graph, top) if n != number]
    else:
        numbers = [number_of(graph, node) for node in nodes]
    if not numbers:
        raise InputError("there are no features to change")
    found = list(
        measure(
            graph,
            [{n: factor} for n in numbers],
            model,
            transcoders,
            constrained=constrained,
            freeze_attention=freeze_attention,
            mlps=mlps,
            read=[number] if graph.kind[number] == FEATURE else [],
            sites=sites,
            remote=remote,
            whole_logits=False,
        )
    )
    return EffectTable(
        target=_target_name(graph, number),
        node=tuple(numbers),
        ids=tuple(graph.node(n).id for n in numbers),
        labels=tuple(graph.label(n) for n in numbers),
        predicted=torch.cat([one.predicted[:, number] for one in found]),
        measured=torch.cat([one.values[1:, number] - one.values[0, number] for one in found]),
        activation=graph.value[numbers].double(),
        influence=graph.influence()[numbers],
        factor=factor,
        settings={
            "constrained": sorted(constrained),
            "freeze_attention": freeze_attention,
            "mlps": mlps,
        },
    )


def top_features(graph: AttributionGraph, top: int) -> list[int]:
    """Numbers of the most influential features of the graph once pruned, in ``graph``'s numbers."""
    pruned = graph if "pruning" in graph.metadata else graph.prune()
    influence = pruned.influence().masked_fill(pruned.kind != FEATURE, 0.0)
    order = influence.argsort(descending=True)[:top].tolist()
    chosen = [pruned.node(i) for i in order if influence[i] > 0]
    return [graph.find(node.layer, node.index, node.position).number for node in chosen]


def agreement(predicted: Tensor, measured: Tensor) -> Agreement:
    """Sign agreement and Spearman's rank correlation of two columns ``(n,)``."""
    sign = float((predicted.sign() == measured.sign()).double().mean())
    ranks = torch.stack([_ranks(predicted), _ranks(measured)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return Agreement(sign, float((ranks[0] @ ranks[1]) / norms) if norms > 0 else float("nan"))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values at their mean rank."""
    ordered = values.double().sort().values
    below = torch.searchsorted(ordered, values.double())
    up_to = torch.searchsorted(ordered, values.double(), right=True)
    return (below + up_to - 1).double() / 2


def _target_name(graph: AttributionGraph, number: int) -> str:
    logits = graph.of_kind("logit").tolist()
    return graph.target_names[logits.index(number)] if number in logits else graph.label(number)

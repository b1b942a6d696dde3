"""``intervene``: change features of a graph in the real model, next to what the graph predicts.

After Ameisen et al. 2025, "Circuit Tracing" (Validating attribution graph hypotheses with
interventions), and its two ways of patching: *open-ended*, where everything downstream responds,
and *constrained*, where the MLPs of some layers are held at their original outputs, so that only
direct effects pass them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nnsight_transcoders.attachment.replacement import check_layerwise, check_transcodes
from nnsight_transcoders.errors import InputError, MismatchError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .graph import FEATURE, LOGIT, AttributionGraph
from .grouping import NodeKey, numbers_of
from .intervention_run import InterventionRun, Outcome, Settings, freeze_run
from .predict import predicted_changes

Mlps = Literal["model", "transcoders"]

#: How many feature values a batch may hold (rows x positions x d_transcoder).
BATCH_ELEMENTS = 64 * 2**20
#: How far the model's own values may be from the graph's (relative), by the model's dtype.
_AGREES = {torch.float64: 1e-4, torch.float32: 1e-2}


@dataclass(frozen=True, eq=False)
class Intervention:
    """What one intervention did, and what the graph says it does. N nodes, V vocabulary.

    Attributes:
        graph: The graph.
        factors: Node number -> what its activation was multiplied by.
        before: ``(N,)`` activations of features and values of logits without the intervention (the
            logit minus the mean logit; for a direction its product); NaN for other nodes.
        after: ``(N,)`` the same with it.
        predicted: ``(N,)`` the change of each by the graph's edges (see ``predict.py``).
        logits_before: ``(V,)`` the model's logits at the targets' position (before soft-capping).
        logits_after: ``(V,)`` the same with the intervention.
        probabilities_before: ``(V,)``.
        probabilities_after: ``(V,)``.
    """

    graph: AttributionGraph
    factors: dict[int, float]
    before: Tensor
    after: Tensor
    predicted: Tensor
    logits_before: Tensor
    logits_after: Tensor
    probabilities_before: Tensor
    probabilities_after: Tensor

    @property
    def measured(self) -> Tensor:
        """``(N,)`` the change of each feature's activation and each logit."""
        return self.after - self.before

    def top_tokens(self, model: Any, k: int = 5) -> list[tuple[str, float, float]]:
        """The most likely next tokens with the intervention: (text, probability before, after)."""
        best = self.probabilities_after.topk(k).indices.tolist()
        tokenizer = getattr(model, "tokenizer", None)
        names = [f"<{i}>" if tokenizer is None else tokenizer.decode([i]) for i in best]
        chances = [(self.probabilities_before[i], self.probabilities_after[i]) for i in best]
        return [(name, float(a), float(b)) for name, (a, b) in zip(names, chances, strict=True)]

    def __repr__(self) -> str:
        changed = ", ".join(f"{self.graph.node(i).id}: x{f:g}" for i, f in self.factors.items())
        lines = [f"Intervention {{{changed}}}"]
        logits = self.graph.of_kind("logit").tolist()
        for name, i in zip(self.graph.target_names, logits, strict=True):
            lines.append(
                f"  logit {name!r}: {float(self.before[i]):+.3f} -> {float(self.after[i]):+.3f} "
                f"(measured {float(self.measured[i]):+.3f}, "
                f"predicted {float(self.predicted[i]):+.3f})"
            )
        features = self.measured.nan_to_num().abs()
        features[self.graph.kind == LOGIT] = 0
        features[list(self.factors)] = 0
        for i in features.argsort(descending=True)[:5].tolist():
            if features[i] > 0:
                lines.append(
                    f"  {self.graph.label(i)}: {float(self.before[i]):.3f} -> "
                    f"{float(self.after[i]):.3f} (predicted change {float(self.predicted[i]):+.3f})"
                )
        return "\n".join(lines)


def intervene(
    graph: AttributionGraph,
    changes: Mapping[NodeKey, float],
    model: Any,
    transcoders: TranscoderSet,
    *,
    constrained: Collection[int] = (),
    freeze_attention: bool = True,
    mlps: Mlps = "model",
    directions: Mapping[str, Tensor] | None = None,
    sites: Sites | None = None,
) -> Intervention:
    """Run the real model with some features multiplied; see ``AttributionGraph.intervene``."""
    return intervene_each(
        graph,
        [changes],
        model,
        transcoders,
        constrained=constrained,
        freeze_attention=freeze_attention,
        mlps=mlps,
        directions=directions,
        sites=sites,
    )[0]


def intervene_each(
    graph: AttributionGraph,
    changes: Sequence[Mapping[NodeKey, float]],
    model: Any,
    transcoders: TranscoderSet,
    *,
    constrained: Collection[int] = (),
    freeze_attention: bool = True,
    mlps: Mlps = "model",
    directions: Mapping[str, Tensor] | None = None,
    sites: Sites | None = None,
) -> list[Intervention]:
    """Several interventions, each on its own, as rows of few batches (see ``intervene``)."""
    asked = [_factors(graph, one) for one in changes]
    if mlps not in get_args(Mlps):
        raise InputError(f"unknown mlps {mlps!r}: use 'model' or 'transcoders'")
    if "transcoders" in getattr(model, "__dict__", {}):
        raise InputError("this model has transcoders attached: give the original model")
    if any(i < 0 for i in graph.token_ids):
        raise InputError("the graph does not know all its token ids, so that it cannot be run")
    module = hf_module(model)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    check_transcodes(transcoders)
    check_layerwise(transcoders)
    pinned = frozenset(constrained)
    if not pinned <= set(range(sites.n_layers)):
        raise InputError(
            f"constrained layers {sorted(pinned)}: the model has layers 0 to {sites.n_layers - 1}"
        )
    features, token_ids = _features_by_layer(graph, transcoders), torch.tensor(graph.token_ids)
    frozen = freeze_run(model, module, sites, token_ids, transcoders) if freeze_attention else None
    run = InterventionRun(
        model,
        module,
        sites,
        transcoders,
        frozen=frozen,
        pinned=pinned,
        follow=transcoders.layers if mlps == "transcoders" else (),
        wanted={layer: (graph.position[n], graph.index[n]) for layer, n in features.items()},
        position=_target_position(graph),
    )
    widest = max(transcoders.config(layer).d_transcoder for layer in transcoders.layers)
    rows = max(1, BATCH_ELEMENTS // (len(token_ids) * widest) - 1)
    found = []
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        ids = token_ids.expand(len(part) + 1, -1)
        outcome = run.run(ids, _settings(graph, part, transcoders.layers))
        values = _node_values(graph, features, outcome, directions or {})
        _check_same_run(graph, values[0], next(module.parameters()).dtype)
        predicted = predicted_changes(graph, _factor_table(graph, part), pinned)
        found += _interventions(graph, part, outcome, values, predicted)
    return found


def _interventions(
    graph: AttributionGraph,
    asked: Sequence[dict[int, float]],
    outcome: Outcome,
    values: Tensor,
    predicted: Tensor,
) -> list[Intervention]:
    logits, chances = outcome.logits.cpu(), outcome.probabilities.cpu()
    return [
        Intervention(
            graph=graph,
            factors=factors,
            before=values[0],
            after=values[row],
            predicted=predicted[row - 1],
            logits_before=logits[0],
            logits_after=logits[row],
            probabilities_before=chances[0],
            probabilities_after=chances[row],
        )
        for row, factors in enumerate(asked, start=1)
    ]


def _factors(graph: AttributionGraph, changes: Mapping[NodeKey, float]) -> dict[int, float]:
    """Node number -> factor.

    Raises:
        InputError: Nothing to change, a node that is no feature, one named twice, or no number.
    """
    if not changes:
        raise InputError("nothing to change: give {node: factor, ...}")
    found: dict[int, float] = {}
    for key, factor in changes.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor != factor:
            raise InputError(f"node {key!r}: {factor!r} is no factor to multiply an activation by")
        for number in numbers_of(graph, key):
            if graph.kind[number] != FEATURE:
                raise InputError(
                    f"{graph.label(number)} (node {number}) is no feature: only features are "
                    "changed"
                )
            if number in found:
                raise InputError(f"node {graph.node(number).id} is named twice")
            found[number] = float(factor)
    return found


def _target_position(graph: AttributionGraph) -> int:
    positions = set(graph.position[graph.of_kind("logit")].tolist())
    if len(positions) != 1:
        raise InputError(f"the graph's targets stand at {len(positions)} positions, expected one")
    return positions.pop()


def _features_by_layer(graph: AttributionGraph, transcoders: TranscoderSet) -> dict[int, Tensor]:
    """Layer -> the numbers of its feature nodes.

    Raises:
        MismatchError: A feature that the set does not have.
    """
    features = graph.of_kind("feature")
    layers = graph.layer[features]
    for layer in sorted(set(layers.tolist())):
        width = transcoders.config(layer).d_transcoder if layer in transcoders else 0
        highest = int(graph.index[features[layers == layer]].max())
        if highest >= width:
            raise MismatchError(
                f"the graph has feature {highest} of layer {layer}; the set has {width} there"
            )
    return {layer: features[layers == layer] for layer in sorted(set(layers.tolist()))}


def _settings(
    graph: AttributionGraph, asked: Sequence[Mapping[int, float]], layers: Sequence[int]
) -> dict[int, Settings]:
    """The interventions of a batch by layer; row 0 is the one without any."""
    entries = [(row, n, f) for row, one in enumerate(asked, start=1) for n, f in one.items()]
    found = {}
    for layer in layers:
        here = [(row, n, f) for row, n, f in entries if int(graph.layer[n]) == layer]
        if here:
            rows, numbers, factors = zip(*here, strict=True)
            at = torch.tensor(numbers)
            found[layer] = Settings(
                row=torch.tensor(rows),
                position=graph.position[at],
                index=graph.index[at],
                factor=torch.tensor(factors, dtype=torch.float64),
            )
    return found


def _factor_table(graph: AttributionGraph, asked: Sequence[Mapping[int, float]]) -> Tensor:
    table = torch.full((len(asked), graph.n_nodes), float("nan"), dtype=torch.float64)
    for row, factors in enumerate(asked):
        table[row, list(factors)] = torch.tensor(list(factors.values()), dtype=torch.float64)
    return table


def _node_values(
    graph: AttributionGraph,
    features: Mapping[int, Tensor],
    outcome: Outcome,
    directions: Mapping[str, Tensor],
) -> Tensor:
    """``(B, N)`` activations of features and values of logits; NaN elsewhere."""
    n_rows = len(outcome.logits)
    values = torch.full((n_rows, graph.n_nodes), float("nan"), dtype=torch.float64)
    for layer, numbers in features.items():
        values[:, numbers] = outcome.activations[layer].double().cpu()
    logits, final = outcome.logits.double().cpu(), outcome.final.double().cpu()
    centred = logits - logits.mean(-1, keepdim=True)
    for name, number in zip(graph.target_names, graph.of_kind("logit").tolist(), strict=True):
        token = int(graph.index[number])
        if token >= 0:
            values[:, number] = centred[:, token]
        elif name in directions:
            values[:, number] = final @ directions[name].detach().double().cpu()
        else:
            raise InputError(
                f"target {name!r} is a direction, which the graph does not hold: pass "
                f"directions={{{name!r}: vector}}"
            )
    return values


def _check_same_run(graph: AttributionGraph, before: Tensor, dtype: torch.dtype) -> None:
    """Whether the model and set are those that the graph is of."""
    features = graph.of_kind("feature")
    if not len(features):
        return
    expected, found = graph.value[features].double(), before[features]
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if difference > _AGREES.get(dtype, 0.1):
        raise MismatchError(
            f"the features' activations on this prompt differ from the graph's by {difference:.1e} "
            "(relative): this is not the model or the transcoder set that the graph was made with"
        )

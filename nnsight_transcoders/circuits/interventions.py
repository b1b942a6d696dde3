"""``intervene``: change nodes of a graph in the real model, next to what the graph predicts.

After Ameisen et al. 2025, "Circuit Tracing" (Validating attribution graph hypotheses with
interventions), and its two ways of patching: *open-ended*, where everything downstream responds,
and *constrained*, where the MLPs of some layers are held at their original outputs, so that only
direct effects pass them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnsight_transcoders.sets import TranscoderSet

from .collect import token_texts
from .graph import LOGIT, AttributionGraph
from .grouping import NodeKey
from .intervention_measure import Measured, measure


@dataclass(frozen=True, eq=False)
class Intervention:
    """What one intervention did, and what the graph says it does. N nodes, V vocabulary.

    Attributes:
        graph: The graph.
        factors: Node number -> what its activation was multiplied by.
        before: ``(N,)`` activations of features and values of logits without the intervention (the
            logit minus the mean logit; for a direction its product); NaN for other nodes, and for
            features that were not read.
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
        best = self.probabilities_after.topk(k).indices
        names = token_texts(model, best)
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
    **options: Any,
) -> Intervention:
    """Run the real model with some nodes multiplied; see ``AttributionGraph.intervene``."""
    return intervene_each(graph, [changes], model, transcoders, **options)[0]


def intervene_each(
    graph: AttributionGraph,
    changes: Sequence[Mapping[NodeKey, float]],
    model: Any,
    transcoders: TranscoderSet,
    **options: Any,
) -> list[Intervention]:
    """Several interventions, each on its own, as rows of few batches (see ``intervene``)."""
    batches = measure(graph, changes, model, transcoders, **options)
    return [one for batch in batches for one in _interventions(graph, batch)]


def _interventions(graph: AttributionGraph, batch: Measured) -> Iterator[Intervention]:
    logits, chances = batch.logits, batch.probabilities
    assert logits is not None and chances is not None
    for row, factors in enumerate(batch.factors, start=1):
        yield Intervention(
            graph=graph,
            factors=factors,
            before=batch.values[0],
            after=batch.values[row],
            predicted=batch.predicted[row - 1],
            logits_before=logits[0],
            logits_after=logits[row],
            probabilities_before=chances[0],
            probabilities_after=chances[row],
        )

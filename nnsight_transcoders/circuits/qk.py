"""QK attribution: why a head looks where it looks.

The score of a head between two positions is bilinear in what the residual stream holds there, once
QK norms and the norm before attention stand at the run's denominators. So it is a sum over pairs of
a component at the destination and a component at the source: the attention counterpart of a graph's
edges, which hold patterns fixed (Ameisen et al. 2025, section "Limitations"; Kamath et al. 2025,
"Tracing Attention Computation Through Feature Interactions"). The sum of all terms is the score.

Legend: n components at the destination, m at the source, E width of a head.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import InputError

from .collect import position_in
from .contributions import CircuitRun
from .remote_scores import attention_scores
from .scores import Affine
from .stream import Component, stream_components


@dataclass(frozen=True)
class QKAttribution:
    """One score taken apart.

    Attributes:
        layer: The attention's layer.
        head: The head.
        score: The model's own score, scaled, before soft-capping, mask and softmax.
        destinations: The n components at the position that looks.
        sources: The m components at the position looked at.
        terms: ``(n, m)``; its sum is the score. The last row and column are the constants of
            queries and keys: biases of the projections and of norms. A model with ALiBi has one
            more row and column behind them, of kind ``"position"`` and of this layer: their
            crossing is what the model adds to the score, their other terms are zero.
    """

    layer: int
    head: int
    score: float
    destinations: tuple[Component, ...]
    sources: tuple[Component, ...]
    terms: Tensor

    def top(self, k: int = 20) -> list[tuple[Component, Component, float]]:
        """The largest terms by magnitude: destination, source, value.

        Raises:
            InputError: ``k`` below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        flat = self.terms.flatten()
        found = flat.abs().topk(min(k, len(flat))).indices.tolist()
        width = len(self.sources)
        return [
            (self.destinations[i // width], self.sources[i % width], float(flat[i])) for i in found
        ]

    def by_kind(self) -> dict[tuple[str, str], float]:
        """Sums of the terms by the kinds of their two components; they sum to the score too."""
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for row, destination in zip(self.terms.tolist(), self.destinations, strict=True):
            for value, source in zip(row, self.sources, strict=True):
                sums[destination.kind, source.kind] += value
        return dict(sums)


def qk_attribution(
    circuit: CircuitRun, layer: int, head: int, source: int, destination: int = -1
) -> QKAttribution:
    """Take the score of a head at (destination, source) apart.

    Args:
        circuit: The run.
        layer: The attention's layer.
        head: The query head.
        source: The position looked at.
        destination: The position that looks, not before the source.

    Raises:
        InputError: A layer, head or position that there is not.
        SiteError: This attention's scores are not scaled queries x keys made from its input by
            projections, norms and a rotary embedding, plus a constant (ALiBi).
    """
    sites, length = circuit.sites, circuit.run.n_positions
    for name, value, size in (("layer", layer, sites.n_layers), ("head", head, sites.n_heads)):
        if not 0 <= value < size:
            raise InputError(f"{name} must be 0 to {size - 1}, got {value}")
    source, destination = position_in(source, length), position_in(destination, length)
    if source > destination:
        raise InputError(f"position {destination} does not look ahead to position {source}")
    attention = attention_scores(circuit, layer)
    query, key = attention.query_and_key(head, source, destination)
    q_side, q_nE = _side(circuit, layer, destination, query)
    k_side, k_mE = _side(circuit, layer, source, key)
    found = QKAttribution(
        layer=layer,
        head=head,
        score=float(attention.scores[head, destination, source]),
        destinations=q_side,
        sources=k_side,
        terms=attention.scaling * (q_nE @ k_mE.T),
    )
    offset = attention.offset(head, source, destination)
    return found if offset is None else _with_offset(found, offset, source, destination)


def _with_offset(
    found: QKAttribution, offset: float, source: int, destination: int
) -> QKAttribution:
    """With one more row and column, whose crossing is what the model adds to the score."""
    terms = nn.functional.pad(found.terms, (0, 1, 0, 1))
    terms[-1, -1] = offset
    return replace(
        found,
        destinations=(*found.destinations, Component("position", found.layer, destination)),
        sources=(*found.sources, Component("position", found.layer, source)),
        terms=terms,
    )


def _side(
    circuit: CircuitRun, layer: int, position: int, affine: Affine
) -> tuple[tuple[Component, ...], Tensor]:
    """The components at a position and each one's part of the query or key there."""
    names, vectors = stream_components(circuit, layer, position)
    norm, constant = circuit.frozen.layers[layer].attention_norm, affine.bias
    if norm is not None:
        vectors = norm.linear_at(vectors, torch.full((len(vectors),), position))
        if norm.bias is not None:
            constant = constant + affine.matrix @ norm.bias
    parts = torch.cat([vectors @ affine.matrix.T, constant[None]])
    return (*names, Component("bias", layer, position)), parts

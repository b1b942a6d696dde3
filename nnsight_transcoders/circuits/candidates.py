"""All candidate nodes of a graph as columns and targets, before any is chosen.

Columns: the F active features by layer and position, then the L * T error nodes, then the T tokens.
Legend: F features, L layers, T positions, G chosen targets (logits), D d_model, C columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .active import ActiveFeatures
from .collect import Run
from .edges import SiteSources
from .linear import Targets
from .targets import TargetSpec


class Engine(Protocol):
    """What computes edges: the explicit operator, or autograd.

    Attributes:
        dtype: In which edges are computed.
        inputs: Per layer, the value the transcoder reads ``(T, D)``.
        final: The final norm's output ``(T, D)``.
    """

    dtype: torch.dtype
    inputs: list[Tensor]
    final: Tensor

    def constants(self, biases: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """What the constant terms alone give at each input site and at the final norm ``(T, D)``:
        the frozen model run without features, errors and tokens, with decoder ``biases (D,)``."""
        ...

    def written(self, layer: int, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors ``(m, D)`` at a layer's output site as ``rows`` wants its sources to be."""
        ...

    def rows(self, sources: dict[int, SiteSources], targets: Targets, n_columns: int) -> Tensor:
        """Edges from all sources into a batch of targets ``(B, C)``."""
        ...


@dataclass(frozen=True)
class Candidates:
    """Candidate nodes of one run.

    Attributes:
        run: The run.
        active: Its features and errors.
        chosen: The targets.
        position: Where the targets stand.
        layer: ``(F,)`` of each feature.
        positions: ``(F,)`` of each feature.
        sources: Output site (-1: the embedding) -> the sources that write to it.
        constants: Per layer, what constant terms alone give at the input site ``(T, D)``.
        final_constants: The same at the final norm's output ``(T, D)``.
    """

    run: Run
    active: ActiveFeatures
    chosen: TargetSpec
    position: int
    layer: Tensor
    positions: Tensor
    sources: dict[int, SiteSources]
    constants: list[Tensor]
    final_constants: Tensor

    @classmethod
    def build(
        cls, run: Run, active: ActiveFeatures, chosen: TargetSpec, position: int, engine: Engine
    ) -> Candidates:
        """Number the nodes and lay out the sources by the site they write to."""
        device = run.final.device
        none = torch.zeros(0, dtype=torch.long, device=device)
        layers = [torch.full_like(f.position, number) for number, f in active.layers.items()]
        constants, final_constants = engine.constants(active.bias)
        return cls(
            run=run,
            active=active,
            chosen=chosen,
            position=position,
            layer=torch.cat([none, *layers]),
            positions=torch.cat([none, *(f.position for f in active.layers.values())]),
            sources=site_sources(run, active, engine),
            constants=constants,
            final_constants=final_constants,
        )

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.layer)

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.active.error)

    @property
    def n_columns(self) -> int:
        """C = F + L * T + T."""
        return self.n_features + (self.n_layers + 1) * self.run.n_positions

    @property
    def dtype(self) -> torch.dtype:
        """In which edges are computed."""
        return self.chosen.direction.dtype

    def by_layer(self, features: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Feature numbers ``(n,)`` -> per layer: (layer, which of the n, rows in the layer)."""
        start = 0
        for number, active in self.active.layers.items():
            here = ((features >= start) & (features < start + len(active))).nonzero().flatten()
            if len(here):
                yield number, here, features[here] - start
            start += len(active)

    def gather(self, features: Tensor, name: str) -> Tensor:
        """A field of ``LayerFeatures`` for feature numbers ``(n,)``."""
        parts = list(self.by_layer(features))
        sample = getattr(next(iter(self.active.layers.values())), name)
        out = sample.new_empty(len(features), *sample.shape[1:])
        for number, here, rows in parts:
            out[here] = getattr(self.active.layers[number], name)[rows]
        return out

    def feature_targets(self, features: Tensor) -> Targets:
        """Feature numbers, highest layer first -> the cotangents of their encoder rows."""
        return Targets(
            self.gather(features, "encoder"), self.layer[features], self.positions[features]
        )

    def logit_targets(self) -> Targets:
        """The chosen targets' cotangents at the final norm."""
        at = torch.full_like(self.chosen.index, self.n_layers)
        return Targets(self.chosen.direction, at, torch.full_like(at, self.position))


def site_sources(run: Run, active: ActiveFeatures, engine: Engine) -> dict[int, SiteSources]:
    """All candidate sources by the output site they write to (-1: the embedding)."""
    n_positions, n_layers = run.n_positions, len(active.error)
    everywhere = torch.arange(n_positions, device=run.final.device)
    n_features = sum(len(f) for f in active.layers.values())
    at: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    start = 0
    for features in active.layers.values():
        columns = torch.arange(start, start + len(features), device=everywhere.device)
        for j, target in enumerate(features.targets):
            written = features.decoder[:, j] * features.activation[:, None]
            at[target].append((written, columns, features.position))
        start += len(features)
    for layer in range(n_layers):
        columns = n_features + layer * n_positions + everywhere
        at[layer].append((active.error[layer], columns, everywhere))
    columns = n_features + n_layers * n_positions + everywhere
    at[-1].append((run.embedding.to(engine.dtype), columns, everywhere))
    tables = {}
    for site, parts in at.items():
        vector, column, position = (torch.cat(part) for part in zip(*parts, strict=True))
        if site >= 0:
            vector = engine.written(site, vector, position)
        tables[site] = SiteSources.build(vector, column, position, n_positions)
    return tables

"""All candidate nodes of a graph as columns and targets, before any is chosen.

Columns: the F active features by layer and position, then the L * T error nodes, then the T tokens.
Legend: F features, L layers, T positions, G chosen targets (logits), D d_model, C columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .edges import SiteSources, Sources
from .layer_features import ActiveFeatures, LayerFeatures
from .linear import Targets

if TYPE_CHECKING:  # this module also runs in remote jobs, where there is torch only
    from .collect import Run
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

    def token_sources(self, vectors: Tensor, first_column: int) -> dict[int, list[SiteSources]]:
        """The tokens' embeddings ``(T, D)`` as sources, by the place where they stand."""
        ...

    def rows(self, sources: Sources, targets: Targets, n_columns: int) -> Tensor:
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
        sources: Output site, or place of the tokens -> the sources that write to it.
        constants: Per layer, what constant terms alone give at the input site ``(T, D)``.
        final_constants: The same at the final norm's output ``(T, D)``.
    """

    run: Run
    active: ActiveFeatures
    chosen: TargetSpec
    position: int
    layer: Tensor
    positions: Tensor
    sources: Sources
    constants: list[Tensor]
    final_constants: Tensor

    @classmethod
    def build(
        cls, run: Run, active: ActiveFeatures, chosen: TargetSpec, position: int, engine: Engine
    ) -> Candidates:
        """Number the nodes and lay out the sources by the site they write to."""
        constants, final_constants = engine.constants(active.bias)
        return cls.numbered(
            run,
            active,
            chosen,
            position,
            sources=site_sources(run, active, engine),
            constants=constants,
            final_constants=final_constants,
        )

    @classmethod
    def numbered(
        cls,
        run: Run,
        active: ActiveFeatures,
        chosen: TargetSpec,
        position: int,
        *,
        constants: list[Tensor],
        final_constants: Tensor,
        sources: Sources | None = None,
    ) -> Candidates:
        """Number the nodes; without sources they can be targets only."""
        none = torch.zeros(0, dtype=torch.long, device=run.final.device)
        layers = [torch.full_like(f.position, number) for number, f in active.layers.items()]
        return cls(
            run=run,
            active=active,
            chosen=chosen,
            position=position,
            layer=torch.cat([none, *layers]),
            positions=torch.cat([none, *(f.position for f in active.layers.values())]),
            sources=sources or {},
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
        """A field of ``LayerFeatures`` of length n for feature numbers ``(n,)``."""
        out = getattr(next(iter(self.active.layers.values())), name).new_empty(len(features))
        for number, here, rows in self.by_layer(features):
            out[here] = getattr(self.active.layers[number], name)[rows]
        return out

    def feature_targets(self, features: Tensor) -> Targets:
        """Feature numbers, highest layer first -> the cotangents of their encoder rows."""
        vectors = self.chosen.direction.new_empty(len(features), self.chosen.direction.shape[1])
        for number, here, rows in self.by_layer(features):
            vectors[here] = self.active.layers[number].encoder_of(rows).to(vectors.dtype)
        return Targets(vectors, self.layer[features], self.positions[features])

    def logit_targets(self) -> Targets:
        """The chosen targets' cotangents at the final norm."""
        at = torch.full_like(self.chosen.index, self.n_layers)
        return Targets(self.chosen.direction, at, torch.full_like(at, self.position))


def site_sources(run: Run, active: ActiveFeatures, engine: Engine) -> dict[int, list[SiteSources]]:
    """All candidate sources by the output site they write to, and the tokens."""
    n_positions, n_layers = run.n_positions, len(active.error)
    at: dict[int, list[SiteSources]] = defaultdict(list)
    start = 0
    for features in active.layers.values():
        columns = torch.arange(start, start + len(features), device=run.final.device)
        for j, target in enumerate(features.targets):
            part = SiteSources.build(
                _decoder_rows(features, j),
                features.row,
                features.activation,
                columns,
                features.position,
                n_positions,
            )
            at[target].append(part)
        start += len(features)
    for layer, error in enumerate(active.error):
        at[layer].append(SiteSources.everywhere(error, start + layer * n_positions))
    tokens = run.embedding.to(engine.dtype)
    return {**at, **engine.token_sources(tokens, start + n_layers * n_positions)}


def _decoder_rows(features: LayerFeatures, j: int) -> Tensor | Callable[[], Tensor]:
    """The rows ``(u, D)`` that a layer's features write to the ``j``-th of its targets."""
    if isinstance(features.decoder, Tensor):
        return features.decoder[:, j]
    return partial(features.decoder.written_to, j)

"""Edges and constant terms of a frozen model (torch only: it also runs in remote jobs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .edges import SiteSources, Sources, edge_rows
from .linear import ATTENDED, EMBEDDING, FrozenModel, Targets

#: Largest table of tokens behind the first attention, in bytes: half of it is kept.
SPREAD_BYTES = 256 * 2**20


class FrozenEngine:
    """What ``candidates.Engine`` asks for, by the explicit linear operator.

    Args:
        frozen: The linear model of a run.
        inputs: Per layer, the value the transcoder reads ``(T, D)``.
        final: The final norm's output ``(T, D)``, in the dtype of the attribution.
        position_embedding: ``(T, D)`` of a separate position embedding, or None.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        inputs: list[Tensor],
        final: Tensor,
        position_embedding: Tensor | None,
    ) -> None:
        self.frozen, self.inputs, self.final = frozen, inputs, final
        self.dtype = final.dtype
        self._position = position_embedding

    def constants(self, biases: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """See ``candidates.Engine.constants``."""
        start = torch.zeros_like(self.final)
        if self._position is not None:
            start = start + self._position.to(self.dtype)
        outputs = [None if bias is None else bias.expand_as(start) for bias in biases]
        replay = self.frozen.replay(start, outputs, constants=True)
        return replay.reads, replay.final

    def token_sources(self, vectors: Tensor, first_column: int) -> dict[int, list[SiteSources]]:
        """See ``candidates.Engine.token_sources``: of short prompts behind the first attention,
        which the targets then need not cross."""
        if self.frozen.parallel or len(vectors) ** 2 * vectors[0].nbytes > SPREAD_BYTES:
            return {EMBEDDING: [SiteSources.everywhere(vectors, first_column)]}
        spread = self.frozen.fold(0).spread(vectors)
        return {ATTENDED: [SiteSources.attended(vectors, spread, first_column)]}

    def rows(self, sources: Sources, targets: Targets, n_columns: int) -> Tensor:
        """See ``candidates.Engine.rows``."""
        return edge_rows(self.frozen, sources, targets, n_columns)

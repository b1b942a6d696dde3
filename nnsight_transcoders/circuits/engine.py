"""The edge engine that every ordinary model gets: the explicit linear operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .collect import Run
from .edges import SiteSources, edge_rows
from .freeze import attribution_dtype, freeze, freeze_norms, input_values, mlp_sides
from .linear import FrozenModel, Targets


class OperatorEngine:
    """Edges and constant terms by the explicit linear operator (see ``candidates.Engine``).

    Args:
        module: The Hugging Face module.
        sites: Its sites.
        run: What ``collect`` kept.
        transcoders: The set.

    Raises:
        SiteError: A part of the model cannot be written down.
    """

    def __init__(
        self, module: nn.Module, sites: Sites, run: Run, transcoders: TranscoderSet
    ) -> None:
        norms = freeze_norms(module, sites, run)
        sides = mlp_sides(sites, run, norms, transcoders)
        self.frozen: FrozenModel = freeze(module, sites, run, norms, sides)
        self.dtype = attribution_dtype(run.final.dtype)
        self.inputs = input_values(run, sides)
        self.final = self.frozen.final_norm.forward(run.final.to(self.dtype))
        self._position = run.position_embedding

    def constants(self, biases: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """See ``candidates.Engine.constants``."""
        start = torch.zeros_like(self.final)
        if self._position is not None:
            start = start + self._position.to(self.dtype)
        outputs = [None if bias is None else bias.expand_as(start) for bias in biases]
        replay = self.frozen.replay(start, outputs, constants=True)
        return replay.reads, replay.final

    def written(self, layer: int, vectors: Tensor, positions: Tensor) -> Tensor:
        """See ``candidates.Engine.written``: as they stand in the residual stream."""
        return self.frozen.to_stream(layer, vectors, positions)

    def rows(self, sources: dict[int, SiteSources], targets: Targets, n_columns: int) -> Tensor:
        """See ``candidates.Engine.rows``."""
        return edge_rows(self.frozen, sources, targets, n_columns)

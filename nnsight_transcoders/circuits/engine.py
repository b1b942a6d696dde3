"""The edge engine that every ordinary model gets: the explicit linear operator."""

from __future__ import annotations

from torch import nn

from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .collect import Run
from .freeze import attribution_dtype, freeze, freeze_norms, input_values, mlp_sides
from .model_weights import ModelWeights
from .operator_engine import FrozenEngine


class OperatorEngine(FrozenEngine):
    """Edges and constant terms by the explicit linear operator (see ``candidates.Engine``).

    Args:
        module: The Hugging Face module, or where else the model's weights are.
        sites: Its sites.
        run: What ``collect`` kept.
        transcoders: The set.
        maps: See ``freeze``.

    Raises:
        SiteError: A part of the model cannot be written down.
    """

    def __init__(
        self,
        module: nn.Module | ModelWeights,
        sites: Sites,
        run: Run,
        transcoders: TranscoderSet,
        *,
        maps: bool = True,
    ) -> None:
        norms = freeze_norms(module, sites, run)
        sides = mlp_sides(sites, run, norms, transcoders)
        frozen = freeze(module, sites, run, norms, sides, maps=maps)
        final = frozen.final_norm.forward(run.final.to(attribution_dtype(run.final.dtype)))
        super().__init__(frozen, input_values(run, sides), final, run.position_embedding)

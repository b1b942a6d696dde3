"""What a graph says about where it comes from."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from nnsight_transcoders._version import __version__
from nnsight_transcoders.models import hub_name
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import dtype_name


def provenance(
    module: nn.Module, sites: Sites, transcoders: TranscoderSet, model_dtype: torch.dtype
) -> dict[str, Any]:
    """The model, the set and the versions, for a graph's metadata."""
    return {
        "n_layers": sites.n_layers,
        "d_model": sites.d_model,
        "vocab_size": sites.vocab_size,
        "model": hub_name(module) or type(module).__name__,
        "architecture": type(module).__name__,
        "model_dtype": dtype_name(model_dtype),
        "transcoders": transcoders.provenance,
        "transcoder_kind": "cross-layer" if transcoders.cross_layer else "per-layer",
        "transcoder_layers": list(transcoders.layers),
        "versions": {"nnsight-transcoders": __version__}
        | {name: version(name) for name in ("nnsight", "torch", "transformers")},
    }

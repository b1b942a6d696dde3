"""Transcoders for nnsight models: replace MLPs, trace circuits, share the weights.

Public names load on first use, so that ``import nnsight_transcoders`` costs nothing: torch,
transformers and nnsight are imported only when a name that needs them is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .attachment import ablate, attach, attached, detach, scale, set_features, steer
    from .builtin import BUILTIN_SETS, builtin_model_path
    from .circuits.attribution import attribute
    from .circuits.blind import BlindStudy
    from .circuits.connections import strongest_connections, top_connections
    from .circuits.contributions import CircuitRun
    from .circuits.global_weights import global_weights
    from .circuits.graph import AttributionGraph
    from .circuits.path_graph import path_graph
    from .circuits.paths import Where, merge_paths, top_paths
    from .circuits.qk import qk_attribution
    from .circuits.summary import feature_summary
    from .circuits.virtual_weights import (
        de_embed,
        logits_of,
        pull_back,
        push_forward,
        read_vectors,
        virtual_weights,
        write_vectors,
    )
    from .circuits.weights import de_embeddings, feature_details, logit_effects
    from .errors import TranscoderError
    from .evaluation import verify
    from .sets import TranscoderSet
    from .sites import Sites, resolve_sites
    from .transcoder import CrossLayerTranscoder, Transcoder, TranscoderConfig

_PUBLIC = {
    "AttributionGraph": ".circuits.graph",
    "BUILTIN_SETS": ".builtin",
    "BlindStudy": ".circuits.blind",
    "CircuitRun": ".circuits.contributions",
    "CrossLayerTranscoder": ".transcoder",
    "Sites": ".sites",
    "Transcoder": ".transcoder",
    "TranscoderConfig": ".transcoder",
    "TranscoderError": ".errors",
    "TranscoderSet": ".sets",
    "Where": ".circuits.paths",
    "ablate": ".attachment",
    "attach": ".attachment",
    "attached": ".attachment",
    "attribute": ".circuits.attribution",
    "builtin_model_path": ".builtin",
    "de_embed": ".circuits.virtual_weights",
    "de_embeddings": ".circuits.weights",
    "detach": ".attachment",
    "feature_details": ".circuits.weights",
    "feature_summary": ".circuits.summary",
    "global_weights": ".circuits.global_weights",
    "logit_effects": ".circuits.weights",
    "logits_of": ".circuits.virtual_weights",
    "merge_paths": ".circuits.paths",
    "path_graph": ".circuits.path_graph",
    "pull_back": ".circuits.virtual_weights",
    "push_forward": ".circuits.virtual_weights",
    "qk_attribution": ".circuits.qk",
    "read_vectors": ".circuits.virtual_weights",
    "resolve_sites": ".sites",
    "scale": ".attachment",
    "set_features": ".attachment",
    "steer": ".attachment",
    "strongest_connections": ".circuits.connections",
    "top_connections": ".circuits.connections",
    "top_paths": ".circuits.paths",
    "verify": ".evaluation",
    "virtual_weights": ".circuits.virtual_weights",
    "write_vectors": ".circuits.virtual_weights",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

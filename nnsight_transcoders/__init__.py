"""Transcoders for nnsight models: replace MLPs, trace circuits, share the weights.

Public names load on first use, so that ``import nnsight_transcoders`` costs nothing: torch,
transformers and nnsight are imported only when a name that needs them is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .attach import ablate, attach, attached, detach, scale, set_features, steer
    from .builtin import BUILTIN_SETS, builtin_model_path
    from .circuits.attribution import attribute
    from .circuits.contributions import CircuitRun
    from .circuits.graph import AttributionGraph
    from .circuits.paths import Where, merge_paths, top_paths
    from .circuits.weights import de_embeddings, feature_details, logit_effects
    from .errors import TranscoderError
    from .evaluation import verify
    from .sets import TranscoderSet
    from .sites import Sites, resolve_sites
    from .transcoder import CrossLayerTranscoder, Transcoder, TranscoderConfig

_PUBLIC = {
    "AttributionGraph": ".circuits.graph",
    "BUILTIN_SETS": ".builtin",
    "CircuitRun": ".circuits.contributions",
    "CrossLayerTranscoder": ".transcoder",
    "Sites": ".sites",
    "Transcoder": ".transcoder",
    "TranscoderConfig": ".transcoder",
    "TranscoderError": ".errors",
    "TranscoderSet": ".sets",
    "Where": ".circuits.paths",
    "ablate": ".attach",
    "attach": ".attach",
    "attached": ".attach",
    "attribute": ".circuits.attribution",
    "builtin_model_path": ".builtin",
    "de_embeddings": ".circuits.weights",
    "detach": ".attach",
    "feature_details": ".circuits.weights",
    "logit_effects": ".circuits.weights",
    "merge_paths": ".circuits.paths",
    "resolve_sites": ".sites",
    "scale": ".attach",
    "set_features": ".attach",
    "steer": ".attach",
    "top_paths": ".circuits.paths",
    "verify": ".evaluation",
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

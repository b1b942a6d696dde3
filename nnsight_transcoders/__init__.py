"""Transcoders for nnsight models: replace MLPs, trace circuits, share the weights.

Public names load on first use, so that ``import nnsight_transcoders`` costs nothing: torch,
transformers and nnsight are imported only when a name that needs them is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .attachment.edit import ablate, attach, attached, detach, scale, set_features, steer
    from .builtin import BUILTIN_SETS, builtin_model_path
    from .circuits.attribution import attribute
    from .circuits.blind import BlindStudy
    from .circuits.connections import strongest_connections, top_connections
    from .circuits.contributions import CircuitRun
    from .circuits.effects import predicted_vs_measured
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
    from .evaluation.measuring import evaluate
    from .evaluation.pareto_sweep import pareto
    from .evaluation.pareto_table import ParetoTable
    from .evaluation.report import Evaluation
    from .evaluation.verifying import verify
    from .features.bundle import FeatureBundle
    from .features.collection import collect_features
    from .features.endpoint import openai_endpoint
    from .features.explain import explain_features
    from .features.labels import FeatureLabels
    from .interop.feature_json import write_feature_files, write_packed_features
    from .interop.schema import validate_graph
    from .interop.upload import upload_graph
    from .plots import (
        plot_attention,
        plot_completeness,
        plot_effects,
        plot_logit_effects,
        plot_pareto,
    )
    from .remote.graph import RemoteGraph
    from .remote.graphs import RemoteGraphs
    from .remote.job_memory import EdgeMemory, estimate_edge_memory
    from .remote.payload import ModelShape, estimate_payload
    from .remote.server import RemoteServer
    from .remote.submitting import submit_graph, submit_graphs
    from .sets import TranscoderSet
    from .site_stream import read_features, stream_site_values
    from .sites import Sites, resolve_sites
    from .training.config import TrainConfig
    from .training.trainer import train
    from .transcoder import CrossLayerTranscoder, Transcoder, TranscoderConfig

_PUBLIC = {
    "AttributionGraph": ".circuits.graph",
    "BUILTIN_SETS": ".builtin",
    "BlindStudy": ".circuits.blind",
    "CircuitRun": ".circuits.contributions",
    "CrossLayerTranscoder": ".transcoder",
    "EdgeMemory": ".remote.job_memory",
    "Evaluation": ".evaluation.report",
    "FeatureBundle": ".features.bundle",
    "FeatureLabels": ".features.labels",
    "ModelShape": ".remote.payload",
    "ParetoTable": ".evaluation.pareto_table",
    "RemoteGraph": ".remote.graph",
    "RemoteGraphs": ".remote.graphs",
    "RemoteServer": ".remote.server",
    "Sites": ".sites",
    "TrainConfig": ".training.config",
    "Transcoder": ".transcoder",
    "TranscoderConfig": ".transcoder",
    "TranscoderError": ".errors",
    "TranscoderSet": ".sets",
    "Where": ".circuits.paths",
    "ablate": ".attachment.edit",
    "attach": ".attachment.edit",
    "attached": ".attachment.edit",
    "attribute": ".circuits.attribution",
    "builtin_model_path": ".builtin",
    "collect_features": ".features.collection",
    "de_embed": ".circuits.virtual_weights",
    "de_embeddings": ".circuits.weights",
    "detach": ".attachment.edit",
    "estimate_edge_memory": ".remote.job_memory",
    "estimate_payload": ".remote.payload",
    "evaluate": ".evaluation.measuring",
    "explain_features": ".features.explain",
    "feature_details": ".circuits.weights",
    "feature_summary": ".circuits.summary",
    "global_weights": ".circuits.global_weights",
    "logit_effects": ".circuits.weights",
    "logits_of": ".circuits.virtual_weights",
    "merge_paths": ".circuits.paths",
    "openai_endpoint": ".features.endpoint",
    "pareto": ".evaluation.pareto_sweep",
    "path_graph": ".circuits.path_graph",
    "plot_attention": ".plots",
    "plot_completeness": ".plots",
    "plot_effects": ".plots",
    "plot_logit_effects": ".plots",
    "plot_pareto": ".plots",
    "predicted_vs_measured": ".circuits.effects",
    "pull_back": ".circuits.virtual_weights",
    "push_forward": ".circuits.virtual_weights",
    "qk_attribution": ".circuits.qk",
    "read_features": ".site_stream",
    "read_vectors": ".circuits.virtual_weights",
    "resolve_sites": ".sites",
    "scale": ".attachment.edit",
    "set_features": ".attachment.edit",
    "steer": ".attachment.edit",
    "stream_site_values": ".site_stream",
    "strongest_connections": ".circuits.connections",
    "submit_graph": ".remote.submitting",
    "submit_graphs": ".remote.submitting",
    "top_connections": ".circuits.connections",
    "top_paths": ".circuits.paths",
    "train": ".training.trainer",
    "upload_graph": ".interop.upload",
    "validate_graph": ".interop.schema",
    "verify": ".evaluation.verifying",
    "virtual_weights": ".circuits.virtual_weights",
    "write_feature_files": ".interop.feature_json",
    "write_packed_features": ".interop.feature_json",
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

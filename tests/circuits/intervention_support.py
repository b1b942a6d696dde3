"""Graphs of tiny models, and how close numbers have to be, for the tests of interventions."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from setups import IDS, model, transcoders

from nnsight_transcoders import AttributionGraph, TranscoderSet, attribute

KINDS = ["per-layer", "skip", "cross-layer"]
ALL = range(zoo.N_LAYERS)


def graph_of(name: str, kind: str, **config: Any) -> tuple[Any, TranscoderSet, AttributionGraph]:
    chosen = transcoders(name, kind, torch.float64, **config)
    nn_model = model(name, torch.float64)
    return nn_model, chosen, attribute(nn_model, chosen, IDS)


def some(graph: AttributionGraph, n: int = 6) -> list[int]:
    """A few features, spread over the graph."""
    features = graph.of_kind("feature").tolist()
    return features[:: max(1, len(features) // n)][:n]


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-4) -> None:
    assert float((found - expected).norm()) <= limit * float(expected.norm())

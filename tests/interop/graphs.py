"""Graphs for the interop tests: of tiny models, pruned, with names."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from setups import IDS, model, transcoders

from nnsight_transcoders import AttributionGraph, attribute


@cache
def whole(kind: str = "per-layer", dtype: torch.dtype = torch.float32) -> AttributionGraph:
    """Not pruned; tokens as ``<id>``."""
    return attribute(model("llama", dtype), transcoders("llama", kind, dtype), IDS)


@cache
def named() -> AttributionGraph:
    """Pruned, with supernodes, pinned nodes and labels, some of them hostile."""
    graph = whole().prune(0.9, 0.98)
    features = graph.of_kind("feature").tolist()
    return graph.named(
        supernodes={"plain": features[:2], "<b>bold</b>": features[2:4]},
        pinned=[features[5], int(graph.of_kind("logit")[0])],
        labels={features[0]: "<script>alert(1)</script>", features[1]: "a label"},
    )


def exported(graph: AttributionGraph | None = None, **options: Any) -> dict[str, Any]:
    """As Neuronpedia's JSON."""
    return (graph or named()).to_neuronpedia(slug="a-graph", model_id="tiny", **options)


def assert_same(found: AttributionGraph, expected: AttributionGraph) -> None:
    """Equal in every field."""
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, torch.Tensor):
            assert other.dtype == value.dtype, name
            assert torch.equal(other, value), name
        else:
            assert other == value, name

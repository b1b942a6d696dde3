"""Interventions in a model that only the server holds: in its process, and in the sandbox, which
has neither weights nor gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ndif_support import PROMPT
from ndif_wire import Wire

from nnsight_transcoders import (
    AttributionGraph,
    RemoteServer,
    TranscoderSet,
    attribute,
    predicted_vs_measured,
)

pytestmark = pytest.mark.ndif


@pytest.fixture(scope="module")
def graph(local: Any, transcoders: TranscoderSet) -> AttributionGraph:
    return attribute(local, transcoders, PROMPT)


def strongest(graph: AttributionGraph, kind: str) -> int:
    of_kind = graph.of_kind(kind)
    return int(of_kind[graph.influence()[of_kind].argmax()])


@pytest.mark.parametrize(
    "options",
    [{}, {"freeze_attention": False}, {"mlps": "transcoders", "constrained": [1]}],
    ids=["frozen", "free", "transcoders"],
)
def test_features_errors_and_tokens(
    model: Any,
    local: Any,
    transcoders: TranscoderSet,
    graph: AttributionGraph,
    wire: Wire,
    options: dict[str, Any],
):
    """Two requests: one of them for the error's value."""
    changes = {strongest(graph, "feature"): -1.0, strongest(graph, "error"): 0}
    changes[strongest(graph, "token")] = 0.5
    found = graph.intervene(changes, model, transcoders, remote=wire.url, **options)
    expected = graph.intervene(changes, local, transcoders, **options)
    assert len(wire.jobs()) == 2
    assert not model.dispatched
    for name in ("before", "after", "logits_after", "probabilities_after"):
        there, here = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4, equal_nan=True)
    at = graph.is_target
    assert float((found.measured - expected.measured)[at].norm()) < 1e-4 * float(
        expected.measured[at].norm()
    )


def test_predicted_and_measured_in_one_request(
    model: Any, local: Any, transcoders: TranscoderSet, graph: AttributionGraph, wire: Wire
):
    found = predicted_vs_measured(graph, model, transcoders, top=10, remote=wire.url)
    expected = predicted_vs_measured(graph, local, transcoders, top=10)
    assert len(wire.jobs()) == 1
    assert found.node == expected.node
    torch.testing.assert_close(found.measured, expected.measured, rtol=1e-3, atol=1e-4)


def test_large_transcoders_stay_here(model: Any, local: Any, per_layer: TranscoderSet, wire: Wire):
    """A run for each layer, whose values come back, and one for the logits."""
    graph = attribute(local, per_layer, PROMPT)
    changes, options = {strongest(graph, "feature"): 0}, {"mlps": "transcoders", "read": ()}
    bounded = RemoteServer(wire.url, max_bytes=120_000)
    found = graph.intervene(changes, model, per_layer, remote=bounded, **options)
    expected = graph.intervene(changes, local, per_layer, **options)
    assert len(wire.jobs()) == 5
    torch.testing.assert_close(found.logits_after, expected.logits_after, rtol=1e-4, atol=1e-4)

"""What several of the tests on a server need."""

from __future__ import annotations

import torch

from nnsight_transcoders import AttributionGraph

PROMPT = "The war lasted from 1732 to 17"


def assert_same_graph(found: AttributionGraph, expected: AttributionGraph) -> None:
    """The same nodes, and every edge equal within 1e-4 of the largest one into its target."""
    for name in ("kind", "layer", "position", "index", "token_ids"):
        assert torch.equal(
            torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(expected, name))
        ), name
    a, b = found.adjacency(), expected.adjacency()
    size = b.abs().amax(1, keepdim=True).clamp_min(b.abs().max() * 1e-3)
    assert ((a - b).abs() / size).max() < 1e-4
    torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.probability, expected.probability, rtol=1e-4, atol=1e-6)
    assert found.completeness_error < 1e-4

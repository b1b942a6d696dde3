"""Feature statistics of a model that only the server has: its values come back batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Loopback

from nnsight_transcoders import TranscoderSet, collect_features
from nnsight_transcoders.builtin.text import sentences

TEXTS = list(sentences(40, seed=3))


def test_the_bundle_is_the_local_one(
    model: Any, local: Any, per_layer: TranscoderSet, server: Loopback, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"layers": [1, 3], "batch_size": 16, "n_tokens_listed": 0}
    before = len(server.requests())
    found = collect_features(
        model, per_layer, TEXTS, tmp_path / "there", remote=server.url, **options
    )
    sizes = server.requests()[before:]
    assert len(sizes) == 3  # one for each batch
    assert max(sizes) < 20_000  # and nothing of the set in it
    assert not model.dispatched
    expected = collect_features(local, per_layer, TEXTS, tmp_path / "here", **options)
    for layer in (1, 3):
        # A feature at its threshold may be on in one and off in the other, by a rounding.
        apart = (found.density(layer) - expected.density(layer)).abs()
        assert float(apart.max()) <= 2 / sum(map(len, TEXTS))
        index = int(expected.density(layer).argmax())
        one, other = found[layer, index], expected[layer, index]
        assert [e.tokens for e in one.examples] == [e.tokens for e in other.examples]
        for a, b in zip(one.examples, other.examples, strict=True):
            assert a.activations == pytest.approx(b.activations, rel=1e-3, abs=1e-4)


def test_lists_of_tokens_are_made_on_the_server(
    model: Any, local: Any, per_layer: TranscoderSet, server: Loopback, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"layers": [2], "n_tokens_listed": 5}
    found = collect_features(
        model, per_layer, TEXTS[:8], tmp_path / "there", remote=server.url, **options
    )
    expected = collect_features(local, per_layer, TEXTS[:8], tmp_path / "here", **options)
    index = int(expected.density(2).argmax())
    for name in ("top_logits", "bottom_logits", "de_embedding"):
        (texts, values), (others, numbers) = (
            zip(*getattr(bundle[2, index], name), strict=True) for bundle in (found, expected)
        )
        assert texts == others
        torch.testing.assert_close(torch.tensor(values), torch.tensor(numbers))

"""Paths, heads, virtual weights, measures and activations of a model that only the server holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ndif_support import PROMPT
from ndif_wire import Wire

from nnsight_transcoders import (
    CircuitRun,
    TranscoderSet,
    evaluate,
    qk_attribution,
    read_features,
    stream_site_values,
    top_paths,
    verify,
    virtual_weights,
)
from nnsight_transcoders.builtin import text
from nnsight_transcoders.circuits.paths import key_of

pytestmark = pytest.mark.ndif

TARGET = " 33"


def runs(
    model: Any, local: Any, transcoders: TranscoderSet, wire: Wire, prompt: str = PROMPT
) -> tuple[CircuitRun, CircuitRun]:
    """The run on the server, and here."""
    return (
        CircuitRun.collect(model, transcoders, prompt, remote=wire.url),
        CircuitRun.collect(local, transcoders, prompt),
    )


def strongest_token(here: CircuitRun) -> int:
    return int(here.run.logits[-1].argmax())


def test_every_heads_contribution(model: Any, local: Any, transcoders: TranscoderSet, wire: Wire):
    """Token, feature, error, head and constant terms of a logit, and of a feature it is made of."""
    there, here = runs(model, local, transcoders, wire)
    token = strongest_token(here)
    targets = [(run, run.token(token)) for run in (there, here)]
    found, expected = (run.contributions(target) for run, target in targets)
    assert [key_of(c) for c in found] == [key_of(c) for c in expected]
    assert {"attention", "feature", "token"} <= {c.kind for c in found}
    scale = max(abs(c.value) for c in expected)
    for a, b in zip(found, expected, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-4, abs=1e-4 * scale)
    strongest = max((c for c in expected if c.kind == "feature"), key=lambda c: abs(c.value))
    through = [
        [c.value for c in run.contributions(run.extend(target, strongest))]
        for run, target in targets
    ]
    assert through[0] == pytest.approx(through[1], rel=1e-4, abs=1e-4 * scale)


def test_the_strongest_paths(model: Any, local: Any, per_layer: TranscoderSet, wire: Wire):
    there, here = runs(model, local, per_layer, wire)
    token = strongest_token(here)
    found, expected = (top_paths(run, run.token(token), depth=3, beam=20) for run in (there, here))
    assert [str(path) for path in found] == [str(path) for path in expected]
    values = [path.value for path in expected]
    assert [path.value for path in found] == pytest.approx(values, rel=1e-4)
    # The run, the target, and a round each: contributions, and the heads that are followed.
    assert len(wire.jobs()) == 2 + 5


def test_a_score_is_taken_apart(model: Any, local: Any, per_layer: TranscoderSet, wire: Wire):
    there, here = runs(model, local, per_layer, wire)
    before = len(wire.jobs())
    found, expected = (qk_attribution(run, 1, 3, 2) for run in (there, here))
    assert len(wire.jobs()) == before + 2
    assert (found.destinations, found.sources) == (expected.destinations, expected.sources)
    size = float(expected.terms.abs().max())
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-4, atol=1e-4 * size)
    assert found.score == pytest.approx(expected.score, abs=1e-4 * size)
    assert not model.dispatched


@pytest.mark.parametrize("head", [None, (2, None), (2, 1)], ids=["direct", "layer", "head"])
def test_virtual_weights(model: Any, local: Any, per_layer: TranscoderSet, wire: Wire, head: Any):
    ends = {"source": (0, [1, 2, 3]), "target": (3, [5, 6]), "head": head}
    found = virtual_weights(model, per_layer, remote=wire.url, **ends)
    expected = virtual_weights(local, per_layer, **ends)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# -- measures ------------------------------------------------------------------------------------


def test_verify(model: Any, local: Any, per_layer: TranscoderSet, wire: Wire):
    sentences = text.documents(1, seed=5)
    found = verify(model, per_layer, sentences, remote=wire.url)
    expected = verify(local, per_layer, sentences)
    assert found.ok
    assert (found.n_tokens, len(found.layers)) == (expected.n_tokens, len(expected.layers))
    assert [found.ce, found.ce_replaced] == pytest.approx([expected.ce, expected.ce_replaced], 1e-4)
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert (a.fvu, a.l0) == pytest.approx((b.fvu, b.l0), rel=1e-3)
        assert a.verdict == b.verdict


def test_evaluate(model: Any, local: Any, transcoders: TranscoderSet, wire: Wire):
    options = {"max_tokens": 200, "batch_size": 8}
    found = evaluate(model, transcoders, "builtin", remote=wire.url, **options)
    expected = evaluate(local, transcoders, "builtin", **options)
    assert (found.n_tokens, found.ce) == pytest.approx((expected.n_tokens, expected.ce), rel=1e-5)
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert (a.fvu, a.l0) == pytest.approx((b.fvu, b.l0), rel=1e-4)
    assert found.together.ce_change == pytest.approx(expected.together.ce_change, abs=1e-5)


# -- activations ---------------------------------------------------------------------------------


def test_activations_for_training(model: Any, local: Any, wire: Wire):
    wanted = [(0, "N1"), (1, "O"), (3, "N1"), (3, "O")]
    batches = [torch.arange(5, 37).reshape(4, 8), torch.arange(37, 53).reshape(2, 8)]
    found = list(stream_site_values(model, wanted, batches, remote=wire.url))
    expected = list(stream_site_values(local, wanted, batches))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(wire.jobs()) == 2


def test_features_that_are_computed_here(
    model: Any, local: Any, transcoders: TranscoderSet, wire: Wire
):
    found = read_features(model, transcoders, PROMPT, remote=wire.url)
    expected = read_features(local, transcoders, PROMPT)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(wire.jobs()) == 1
    # Nothing of the set goes up: it is over 1 MB.
    assert wire.jobs()[0].blob < 20_000

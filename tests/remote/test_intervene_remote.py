"""Interventions in a model that only the server has, against those in a model that is here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from loopback import Loopback
from torch import Tensor

from nnsight_transcoders import (
    AttributionGraph,
    RemoteServer,
    TranscoderSet,
    attribute,
    predicted_vs_measured,
)
from nnsight_transcoders.circuits.interventions import Intervention
from nnsight_transcoders.errors import InputError, PayloadTooLargeError
from nnsight_transcoders.remote.payload import ModelShape, estimate_payload
from nnsight_transcoders.sites import resolve_sites

PROMPT = "the capital of the state containing Stamford is"


@pytest.fixture(scope="module")
def graph(local: Any, transcoders: TranscoderSet) -> AttributionGraph:
    """A graph for each builtin set, with all its error nodes."""
    return attribute(local, transcoders, PROMPT)


def strongest(graph: AttributionGraph, kind: str, n: int) -> list[int]:
    """The most influential nodes of a kind."""
    of_kind = graph.of_kind(kind)
    return of_kind[graph.influence()[of_kind].argsort(descending=True)][:n].tolist()


def same(found: Intervention, expected: Intervention) -> None:
    """All numbers of two interventions, to what another order of float32 sums makes of them."""
    assert found.factors == expected.factors
    for field in fields(Intervention):
        there, here = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(here, Tensor):
            torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4, equal_nan=True)
    moved = (found.measured - expected.measured).nan_to_num().norm()
    assert float(moved) <= 1e-4 * float(expected.measured.nan_to_num().norm())


# -- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_attention": False},
        {"mlps": "transcoders"},
        {"constrained": range(4)},
        {"constrained": [2], "mlps": "transcoders"},
    ],
    ids=["default", "free", "transcoders", "constrained", "both"],
)
def test_a_remote_intervention_is_the_local_one(
    model: Any,
    local: Any,
    transcoders: TranscoderSet,
    graph: AttributionGraph,
    server: Loopback,
    options: dict[str, Any],
) -> None:
    first, second = strongest(graph, "feature", 2)
    changes = {first: 0, second: -2.0}
    before = len(server.requests())
    found = graph.intervene(changes, model, transcoders, remote=server.url, **options)
    assert len(server.requests()) == before + 1
    assert not model.dispatched
    same(found, graph.intervene(changes, local, transcoders, **options))


def test_errors_and_tokens_too(
    model: Any, local: Any, transcoders: TranscoderSet, graph: AttributionGraph, server: Loopback
) -> None:
    """Two requests: one for the errors' values."""
    (feature,), (token,) = strongest(graph, "feature", 1), strongest(graph, "token", 1)
    changes = {feature: 2.0, token: 0.5, tuple(strongest(graph, "error", 3)): 0}
    before = len(server.requests())
    found = graph.intervene(changes, model, transcoders, remote=server.url)
    assert len(server.requests()) == before + 2
    same(found, graph.intervene(changes, local, transcoders))


def test_the_rehearsal(local: Any, per_layer: TranscoderSet) -> None:
    graph = attribute(local, per_layer, PROMPT)
    changes = {strongest(graph, "feature", 1)[0]: 0, strongest(graph, "error", 1)[0]: 3.0}
    found = graph.intervene(changes, local, per_layer, remote="local")
    same(found, graph.intervene(changes, local, per_layer))


def test_a_table_takes_one_request(
    model: Any, local: Any, transcoders: TranscoderSet, graph: AttributionGraph, server: Loopback
) -> None:
    target = strongest(graph, "feature", 20)[-1]
    cases: list[dict[str, Any]] = [{}, {"mlps": "transcoders"}, {"target": target}]
    for options in cases:
        before = len(server.requests())
        found = predicted_vs_measured(
            graph, model, transcoders, top=10, remote=server.url, **options
        )
        assert len(server.requests()) == before + 1
        expected = predicted_vs_measured(graph, local, transcoders, top=10, **options)
        assert (found.node, found.target) == (expected.node, expected.target)
        torch.testing.assert_close(found.measured, expected.measured, rtol=1e-3, atol=1e-4)
        assert torch.equal(found.predicted, expected.predicted)


# -- what travels --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mlps": "transcoders"}, {}], ids=["transcoders", "model"])
def test_large_transcoders_stay_here(
    model: Any,
    local: Any,
    transcoders: TranscoderSet,
    graph: AttributionGraph,
    server: Loopback,
    options: dict[str, Any],
) -> None:
    """With transcoders that answer, and features that compete (the skip set's): a run for each
    layer, whose values come back, and one for the logits."""
    features = strongest(graph, "feature", 30)
    layers = [int(graph.layer[n]) for n in features]
    lower = features[layers.index(min(layers))]
    upper = features[layers.index(max(layers))]
    changes = {lower: 0, upper: -1.0, strongest(graph, "error", 1)[0]: 2.0}
    before = len(server.requests())
    bounded = RemoteServer(server.url, max_bytes=120_000)
    found = graph.intervene(changes, model, transcoders, remote=bounded, **options)
    sent = server.requests()[before:]
    same(found, graph.intervene(changes, local, transcoders, **options))
    competing = transcoders.config(0).activation == "topk"
    n_runs = 4 if "mlps" in options else 2 if competing else 0
    assert len(sent) == 1 + n_runs + 1  # the error's value; the layers; the logits
    assert max(sent) < 120_000


def test_features_that_compete_are_read_here(model: Any, local: Any, server: Loopback) -> None:
    """Those that are only read take no request of their own."""
    chosen = TranscoderSet.from_pretrained("builtin/skip")
    graph = attribute(local, chosen, PROMPT).prune()
    features = strongest(graph, "feature", 30)
    changes = {min(features, key=lambda n: int(graph.layer[n])): 0}
    before = len(server.requests())
    bounded = RemoteServer(server.url, max_bytes=120_000)
    same(
        graph.intervene(changes, model, chosen, remote=bounded),
        graph.intervene(changes, local, chosen),
    )
    assert len(server.requests()) == before + 2


def test_a_table_of_features_that_compete_takes_two_requests(
    model: Any, local: Any, server: Loopback
) -> None:
    """However many layers they are in."""
    chosen = TranscoderSet.from_pretrained("builtin/skip")
    graph = attribute(local, chosen, PROMPT)
    features = strongest(graph, "feature", graph.n_nodes)
    *nodes, top = [next(n for n in features if int(graph.layer[n]) == layer) for layer in range(4)]
    for target in (None, top):
        before = len(server.requests())
        bounded = RemoteServer(server.url, max_bytes=120_000)
        options: dict[str, Any] = {"nodes": nodes, "target": target, "factor": -3.0}
        found = predicted_vs_measured(graph, model, chosen, remote=bounded, **options)
        assert len(server.requests()) == before + 2
        expected = predicted_vs_measured(graph, local, chosen, **options)
        assert float(expected.measured.abs().max()) > 1e-2
        torch.testing.assert_close(found.measured, expected.measured, rtol=1e-3, atol=1e-4)


def test_only_rows_travel(
    model: Any, local: Any, per_layer: TranscoderSet, server: Loopback
) -> None:
    """Within 20 % of the estimate, and little more for a feature than its two rows."""
    graph = attribute(local, per_layer, PROMPT).prune()
    shape = ModelShape.of(model._module, resolve_sites(model))
    itemsize = per_layer.load(0).W_enc.element_size()
    sizes = {}
    for n in (1, 10):
        changed = strongest(graph, "feature", n)
        result = graph.intervene(
            dict.fromkeys(changed, 0), model, per_layer, read=(), remote=server.url
        )
        assert result.after.isnan().sum() == graph.n_nodes - n - len(graph.of_kind("logit"))
        estimate = estimate_payload(
            "intervention",
            shape,
            n_positions=len(graph.token_ids),
            n_features=n,
            itemsize=itemsize,
        )
        sizes[n] = server.requests()[-1]
        assert sizes[n] == pytest.approx(estimate.up, rel=0.2)
    assert (sizes[10] - sizes[1]) / 9 < 1.2 * (2 * shape.d_model + 2) * itemsize


def test_what_is_too_large_is_not_sent(
    model: Any, local: Any, per_layer: TranscoderSet, server: Loopback
) -> None:
    graph = attribute(local, per_layer, PROMPT).prune()
    changes = {strongest(graph, "feature", 1)[0]: 0}
    before = len(server.requests())
    with pytest.raises(PayloadTooLargeError, match="read="):
        graph.intervene(changes, model, per_layer, remote=RemoteServer(server.url, max_bytes=9000))
    with pytest.raises(InputError, match="read= names features"):
        graph.intervene(changes, model, per_layer, read=[-1], remote=server.url)
    assert len(server.requests()) == before


def test_logits_in_another_dtype(
    model: Any, local: Any, per_layer: TranscoderSet, server: Loopback
) -> None:
    graph = attribute(local, per_layer, PROMPT).prune()
    changes = {strongest(graph, "feature", 1)[0]: 0}
    coarse = RemoteServer(server.url, dtype="bfloat16")
    found = graph.intervene(changes, model, per_layer, remote=coarse)
    expected = graph.intervene(changes, local, per_layer)
    assert found.logits_after.dtype == torch.bfloat16
    torch.testing.assert_close(found.logits_after.float(), expected.logits_after, rtol=1e-2, atol=0)
    # The nodes' numbers are exact all the same.
    torch.testing.assert_close(found.after, expected.after, rtol=1e-4, atol=1e-4, equal_nan=True)

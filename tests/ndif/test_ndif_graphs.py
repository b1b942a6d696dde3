"""Attribution graphs of a model that only the server holds: numbers, requests, bytes."""

from __future__ import annotations

from typing import Any

import pytest
from ndif_support import PROMPT, assert_same_graph
from ndif_wire import Wire

from nnsight_transcoders import (
    ModelShape,
    TranscoderSet,
    attribute,
    estimate_payload,
    resolve_sites,
    submit_graphs,
)
from nnsight_transcoders.builtin import builtin_model_path

pytestmark = pytest.mark.ndif


def test_a_graph_in_two_requests(model: Any, local: Any, transcoders: TranscoderSet, wire: Wire):
    expected = attribute(local, transcoders, PROMPT, max_feature_nodes=200)
    found = attribute(model, transcoders, PROMPT, max_feature_nodes=200, remote=wire.url)
    assert_same_graph(found, expected)
    assert len(wire.jobs()) <= 2
    assert found.metadata["remote"]["requests"] == len(wire.jobs())
    assert found.metadata["remote"]["sent_bytes"] == sum(job.blob for job in wire.jobs())


def test_one_request_where_the_weights_are_here(
    model: Any, local: Any, transcoders: TranscoderSet, wire: Wire
):
    expected = attribute(local, transcoders, PROMPT)
    found = attribute(model, transcoders, PROMPT, remote=wire.url, weights=builtin_model_path())
    assert_same_graph(found, expected)
    assert len(wire.jobs()) == 1


def test_several_prompts_in_one_session(
    model: Any, local: Any, transcoders: TranscoderSet, wire: Wire
):
    prompts = [PROMPT, "The trial lasted from 1461 to 14"]
    pending = submit_graphs(model, transcoders, prompts, remote=wire.url, weights="server")
    for found, prompt in zip(pending.result(), prompts, strict=True):
        assert_same_graph(found, attribute(local, transcoders, prompt))
    assert len(wire.jobs()) == pending.n_requests == 2


def test_what_is_sent_is_what_was_estimated(model: Any, transcoders: TranscoderSet, wire: Wire):
    found = attribute(model, transcoders, PROMPT, remote=wire.url, weights="server")
    module = model._module
    shape = ModelShape.of(module, resolve_sites(module))
    feature = found.of_kind("feature")
    active = {(int(found.layer[n]), int(found.index[n])) for n in feature}
    assert found.metadata["n_active_features"] == len(feature)  # so the nodes say which are active
    # A feature of a cross-layer set writes to its own layer and all later ones.
    layers = [4 - layer if transcoders.cross_layer else 1 for layer, _ in active]
    written = sum(layers) / len(layers)
    tokens = {"n_positions": len(found.token_ids)}
    edges = estimate_payload(
        "edges",
        shape,
        n_active=len(feature),
        n_unique=len(active),
        n_targets=len(found.target_names),
        n_written=written,
        itemsize=2,  # as the builtin sets are stored
        skip=transcoders.config(0).skip,
        **tokens,
    )
    estimates = [estimate_payload("collect", shape, **tokens), edges]
    sent = [job.blob for job in wire.jobs()]
    for estimate, blob in zip(estimates, sent, strict=True):
        assert estimate.up == pytest.approx(blob, rel=0.2)
    received = found.metadata["remote"]["received_bytes"]
    assert sum(estimate.down for estimate in estimates) == pytest.approx(received, rel=0.2)

"""A graph of a model that is elsewhere is the graph of the model that is here."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import nnsight
import pytest
import torch
import zoo
from setups import transcoders as random_set
from torch import Tensor

from nnsight_transcoders import AttributionGraph, attribute, builtin_model_path, resolve_sites
from nnsight_transcoders.errors import ConfigError, InputError, MismatchError, PayloadTooLargeError
from nnsight_transcoders.remote.payload import ModelShape, estimate_payload
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.submitting import submit_graph

PROMPT = "The war lasted from 1732 to 17"


def adjacency(graph: AttributionGraph) -> Tensor:
    n = len(graph.kind)
    found = torch.zeros(n, n, dtype=graph.weight.dtype)
    found[graph.target, graph.source] = graph.weight
    return found


def assert_same(found: AttributionGraph, expected: AttributionGraph) -> None:
    for name in ("kind", "layer", "position", "index"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("value", "total", "bias", "omitted", "probability"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )
    a, b = adjacency(expected), adjacency(found)
    assert float((a - b).abs().max() / a.abs().max()) < 1e-4
    assert found.completeness_error < 1e-4
    assert found.tokens == expected.tokens and found.target_names == expected.target_names


@pytest.mark.parametrize("where", ["client", "server"])
def test_the_same_graph_in_at_most_two_requests(server, model, local, transcoders, where):
    before = len(server.requests())
    weights = builtin_model_path() if where == "client" else "server"
    found = attribute(model, transcoders, PROMPT, remote=server.url, weights=weights)
    sizes = server.requests()[before:]
    assert len(sizes) == (1 if where == "client" else 2)
    assert_same(found, attribute(local, transcoders, PROMPT))
    record = found.metadata["remote"]
    assert record["edges"].startswith(where) and record["requests"] == len(sizes)
    assert record["sent_bytes"] == sum(sizes)
    assert all(parameter.is_meta for parameter in model._module.parameters())


def test_fewer_nodes_than_features(server, model, local, transcoders):
    options: dict[str, Any] = {"max_feature_nodes": 40}
    found = attribute(model, transcoders, PROMPT, remote=server.url, weights="server", **options)
    assert_same(found, attribute(local, transcoders, PROMPT, **options))
    assert found.omitted.abs().max() > 0


@pytest.mark.parametrize("max_feature_nodes", [7500, 100])
def test_edges_in_parts_where_one_request_would_be_too_large(
    server, model, local, per_layer, max_feature_nodes
):
    before = len(server.requests())
    options: dict[str, Any] = {"max_feature_nodes": max_feature_nodes}
    small = RemoteServer(server.url, max_bytes=200_000)
    found = attribute(model, per_layer, PROMPT, remote=small, weights="server", **options)
    sizes = server.requests()[before:]
    assert len(sizes) > 3 and max(sizes) <= small.max_bytes
    assert_same(found, attribute(local, per_layer, PROMPT, **options))


def test_targets_and_positions(server, model, local, per_layer):
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0))
    for options in (
        {"targets": ["34", 7], "position": 4},
        {"targets": [("up", direction)]},
    ):
        found = attribute(model, per_layer, PROMPT, remote=server.url, weights="server", **options)
        assert_same(found, attribute(local, per_layer, PROMPT, **options))


def test_the_rehearsal(local, transcoders):
    for weights in ("auto", "server"):
        found = attribute(local, transcoders, PROMPT, remote="local", weights=weights)
        assert_same(found, attribute(local, transcoders, PROMPT))
        assert local.attn_implementation == "sdpa"  # as it was


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox", "gemma2", "gemma3", "olmo2", "phi3", "falcon", "bloom", "opt"]
)
def test_every_kind_of_block(name):
    """Fused values, sandwich norms, parallel blocks, position embeddings, biases, soft-capping."""
    model, ids = zoo.nnsight_model(name), [1, 40, 7, 23, 7, 66, 12]
    chosen = random_set(name, "skip")
    found = attribute(model, chosen, ids, remote="local", weights="server")
    assert_same(found, attribute(model, chosen, ids))


def test_results_in_the_dtype_asked_for(server, model, local, per_layer):
    half = RemoteServer(server.url, dtype="bfloat16")
    found = attribute(model, per_layer, PROMPT, remote=half, weights=builtin_model_path())
    expected = attribute(local, per_layer, PROMPT, remote="local")
    assert found.metadata["model_dtype"] == "bfloat16"
    whole = attribute(model, per_layer, PROMPT, remote=server.url, weights=builtin_model_path())
    record, whole_record = found.metadata["remote"], whole.metadata["remote"]
    assert record["received_bytes"] < 0.85 * whole_record["received_bytes"]
    assert found.value[-1] == pytest.approx(float(expected.value[-1]), rel=0.02)


# -- what is sent is what was estimated -----------------------------------------------------------


def test_bytes_are_estimated_within_a_fifth(server, model, transcoders):
    shape = ModelShape.of(model._module, resolve_sites(model._module))
    before = len(server.requests())
    found = attribute(model, transcoders, PROMPT, remote=server.url, weights="server")
    collect, edges = server.requests()[before:]
    nodes = found.of_kind("feature")
    distinct = {(int(found.layer[n]), int(found.index[n])) for n in nodes}
    writes = [
        len(transcoders.load(layer).targets) if transcoders.cross_layer else 1
        for layer, _ in distinct
    ]
    expected = estimate_payload(
        "edges",
        shape,
        n_positions=len(found.tokens),
        n_active=len(nodes),
        n_unique=len(distinct),
        n_written=sum(writes) / len(writes),
        n_targets=len(found.target_names),
        skip=transcoders.config(0).skip,
    )
    first = estimate_payload("collect", shape, n_positions=len(found.tokens))
    assert first.up == pytest.approx(collect, rel=0.2)
    assert expected.up == pytest.approx(edges, rel=0.2)
    down = found.metadata["remote"]["received_bytes"]
    assert first.down + expected.down == pytest.approx(down, rel=0.25)


# -- bad input fails before anything is sent ------------------------------------------------------


def test_what_cannot_be_asked_for(server, model, local, per_layer):
    before = len(server.requests())
    url = server.url
    for error, match, options in (
        (InputError, "no gradients", {"method": "autograd"}),
        (InputError, "empty", {"prompt": ""}),
        (InputError, "outside the prompt", {"position": 99}),
        (InputError, "2 tokens", {"targets": [" 17 45"]}),
        (InputError, "shape", {"targets": [("d", torch.zeros(3))]}),
        (InputError, "at least 1", {"max_feature_nodes": 0}),
        (PayloadTooLargeError, "max_bytes", {"remote": RemoteServer(url, max_bytes=10_000)}),
        (ConfigError, "give 'http", {"remote": "somewhere"}),
    ):
        arguments: dict[str, Any] = {"prompt": PROMPT, "remote": url, **options}
        with pytest.raises(error, match=match):
            attribute(model, per_layer, **arguments)
    with pytest.raises(InputError, match="needs a model with a name"):
        attribute(nnsight.NNsight(local._module), per_layer, [1, 2], remote=url)
    with pytest.raises(MismatchError):
        attribute(zoo.nnsight_model("llama"), per_layer, [1, 2], remote="local")
    with pytest.raises(InputError, match="use attribute"):
        submit_graph(model, per_layer, PROMPT, remote=False)
    assert len(server.requests()) == before


def test_settings_are_checked():
    for bad in ({"max_bytes": 0}, {"dtype": "int8"}, {"host": "ftp://x"}):
        with pytest.raises(ConfigError):
            RemoteServer(**bad)


def test_one_feature_has_to_fit_into_a_request(server, model, per_layer):
    graph = submit_graph(model, per_layer, PROMPT, remote=server.url, weights="server")
    while graph.status() != "collect: COMPLETED":
        time.sleep(0.01)
    smaller = RemoteServer(server.url, max_bytes=30_000)
    graph._task = dataclasses.replace(graph._task, server=smaller)
    with pytest.raises(PayloadTooLargeError, match="weights="):
        graph.result()

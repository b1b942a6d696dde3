"""Graphs of several prompts are the graphs of each, in the requests of one."""

from __future__ import annotations

import pytest
from test_remote_graph import assert_same
from test_remote_jobs import hasty

from nnsight_transcoders import attribute, builtin_model_path
from nnsight_transcoders.errors import (
    InputError,
    JobPendingError,
    PayloadTooLargeError,
    ServerUnreachableError,
)
from nnsight_transcoders.remote.graphs import RemoteGraphs
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.submitting import submit_graph, submit_graphs

PROMPTS = ["The war lasted from 1732 to 17", "The capital of France is", [5, 9, 40, 2, 77]]


@pytest.mark.parametrize("where", ["client", "server"])
def test_two_requests_for_all(server, model, local, transcoders, where):
    before = len(server.requests())
    weights = builtin_model_path() if where == "client" else "server"
    pending = submit_graphs(model, transcoders, PROMPTS, remote=server.url, weights=weights)
    assert len(pending) == 3 and len({graph.job_ids["collect"] for graph in pending}) == 1
    graphs = pending.result()
    sizes = server.requests()[before:]
    assert len(sizes) == pending.n_requests == (1 if where == "client" else 2)
    for graph, prompt in zip(graphs, PROMPTS, strict=True):
        assert_same(graph, attribute(local, transcoders, prompt))
        assert graph.metadata["remote"]["sent_bytes"] == sum(sizes)


def test_the_rehearsal(local, per_layer):
    for weights in ("auto", "server"):
        graphs = submit_graphs(local, per_layer, PROMPTS, remote="local", weights=weights).result()
        for graph, prompt in zip(graphs, PROMPTS, strict=True):
            assert_same(graph, attribute(local, per_layer, prompt))


def test_as_many_requests_as_the_bound_asks_for(server, model, local, per_layer):
    """Two runs fit into one answer, three do not; no edges fit into one request."""
    before = len(server.requests())
    prompts = [PROMPTS[0], "The trial lasted from 1461 to 14", [5, 9, 40, 2, 77, 3, 4, 8, 9]]
    bounded = RemoteServer(server.url, max_bytes=200_000)
    pending = submit_graphs(model, per_layer, prompts, remote=bounded, weights="server")
    jobs = [graph.job_ids["collect"] for graph in pending]
    assert len(set(jobs)) == 2
    for graph, prompt in zip(pending.result(), prompts, strict=True):
        assert_same(graph, attribute(local, per_layer, prompt))
    sizes = server.requests()[before:]
    assert len(sizes) == pending.n_requests > 4 and max(sizes) <= bounded.max_bytes


def test_settings_of_their_own(server, model, local, per_layer):
    """Graphs that were asked for one by one can share their requests too."""
    settings = [{"targets": ["34"]}, {"max_feature_nodes": 20}, {}]
    graphs = [
        submit_graph(
            model, per_layer, prompt, remote=server.url, weights="server", send=False, **one
        )
        for prompt, one in zip(PROMPTS, settings, strict=True)
    ]
    pending = RemoteGraphs(graphs)
    for graph, prompt, one in zip(pending.result(), PROMPTS, settings, strict=True):
        assert_same(graph, attribute(local, per_layer, prompt, **one))
    assert pending.n_requests == 2


def test_kept_and_taken_up(own_server, model, local, per_layer, tmp_path):
    own_server.control(hold=True)
    arguments = {"remote": own_server.url, "weights": "server", "keep": tmp_path}
    first = submit_graphs(model, per_layer, PROMPTS, **arguments)
    with pytest.raises(JobPendingError) as raised:
        first.result(timeout=0.1)
    assert raised.value.graph is first and "3 collect: RUNNING" in first.status()
    # As another process would: the same call takes up the job, and each graph finds its answer.
    again = submit_graphs(model, per_layer, PROMPTS, **arguments)
    assert again.n_requests == 0 and again[2].job_ids == first[2].job_ids
    own_server.control(hold=False)
    for graph, prompt in zip(again.result(), PROMPTS, strict=True):
        assert_same(graph, attribute(local, per_layer, prompt))
    assert again.n_requests == 1
    # One of them alone has its run already.
    alone = submit_graph(model, per_layer, PROMPTS[1], **{**arguments, "keep": tmp_path / "1"})
    assert_same(alone.result(), attribute(local, per_layer, PROMPTS[1]))
    assert alone.n_requests == 1


def test_a_server_killed_in_the_middle(own_server, model, local, per_layer):
    pending = submit_graphs(model, per_layer, PROMPTS, remote=hasty(own_server), weights="server")
    while pending.status() != "3 collect: COMPLETED":
        pass
    own_server.kill()
    with pytest.raises(ServerUnreachableError) as raised:
        pending.result()
    assert raised.value.graph is pending
    own_server.start()
    for graph, prompt in zip(pending.result(), PROMPTS, strict=True):
        assert_same(graph, attribute(local, per_layer, prompt))
    assert len(own_server.requests()) == 1  # the edges: the runs were kept


def test_a_job_that_the_server_forgot_is_sent_again_once_for_all(own_server, model, per_layer):
    own_server.control(hold=True)
    pending = submit_graphs(model, per_layer, PROMPTS, remote=hasty(own_server), weights="server")
    while "RUNNING" not in pending.status():
        pass
    own_server.kill()
    own_server.start()
    with pytest.raises(JobPendingError):
        pending.result(timeout=0.2)
    assert all(graph.completeness_error < 1e-4 for graph in pending.resubmit().result())
    assert pending.n_requests == 3 and len(own_server.requests()) == 2


def test_bad_input(server, model, per_layer):
    with pytest.raises(InputError, match="no prompt"):
        submit_graphs(model, per_layer, [], remote=server.url)
    with pytest.raises(InputError, match="list of prompts"):
        submit_graphs(model, per_layer, "The war", remote=server.url)
    with pytest.raises(PayloadTooLargeError, match="shorten the prompt"):
        small = RemoteServer(server.url, max_bytes=50_000)
        submit_graphs(model, per_layer, PROMPTS, remote=small)
    one = submit_graph(model, per_layer, PROMPTS[0], remote=server.url, send=False)
    other = submit_graph(model, per_layer, PROMPTS[1], remote=hasty(server), send=False)
    with pytest.raises(InputError, match="same server settings"):
        RemoteGraphs([one, other])

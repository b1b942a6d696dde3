"""What goes wrong between a client and a server, and that nothing is lost by it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from ndif_blocks import embeddings, fails, slow_embeddings
from ndif_layout import REPO_ID
from ndif_server import Server
from ndif_support import PROMPT, assert_same_graph
from ndif_wire import Cut, Exchange, Wire

from nnsight_transcoders import (
    AttributionGraph,
    RemoteServer,
    TranscoderSet,
    attribute,
    submit_graph,
)
from nnsight_transcoders.errors import (
    JobFailedError,
    JobLostError,
    JobPendingError,
    PayloadTooLargeError,
    ServerUnreachableError,
    VersionMismatchError,
)
from nnsight_transcoders.remote.calls import call, submit

pytestmark = pytest.mark.ndif

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def expected(local: Any, per_layer: TranscoderSet) -> AttributionGraph:
    return attribute(local, per_layer, PROMPT)


# -- the server goes away ------------------------------------------------------------------------


def kill_at(wire: Wire, server: Server, moment: str) -> None:
    """End the server once, as a crash would, at some moment of a graph."""
    alive, known = [True], []

    def kill() -> None:
        alive.clear()
        server.kill()
        raise Cut

    def before(exchange: Exchange) -> None:
        if alive and moment == "between" and exchange.path == "/request" and len(wire.jobs()) == 2:
            kill()

    def after(exchange: Exchange, status: int) -> None:
        job = {"collect": 1, "edges": 2}.get(moment)
        if exchange.path.startswith("/response/") and status == 200 and len(wire.jobs()) == job:
            known.append(exchange)
        if alive and len(known) == 2:  # the client has heard that the server has the job
            kill()

    wire.before, wire.after = before, after


@pytest.mark.parametrize("mode", ["sandboxed"], indirect=True)
@pytest.mark.parametrize("moment", ["collect", "between", "edges"])
def test_a_graph_goes_on_after_the_server_was_killed(
    model: Any,
    per_layer: TranscoderSet,
    expected: AttributionGraph,
    wire: Wire,
    server: Server,
    moment: str,
):
    kill_at(wire, server, moment)
    remote = RemoteServer(host=wire.url, patience=0.5)
    with pytest.raises(
        ServerUnreachableError, match="does not answer|lost the connection"
    ) as caught:
        attribute(model, per_layer, PROMPT, remote=remote)
    assert not server.running()
    graph = caught.value.graph
    assert (graph.run is None) == (moment == "collect")  # phase one is kept once it is here
    server.start()
    wire.exchanges.clear()
    assert_same_graph(graph.result(), expected)
    # What the killed server had taken is asked for again, phase one only if it was lost with it.
    assert len(wire.jobs()) == (2 if moment == "collect" else 1)


@pytest.mark.parametrize("mode", ["sandboxed"], indirect=True)
def test_a_job_of_a_killed_server_is_lost(model: Any, wire: Wire, server: Server):
    job = submit(model, IDS, embeddings, 2.0, remote=wire.url)
    while job.status() == "UNKNOWN":
        pass
    server.kill()
    server.start()
    with pytest.raises(JobLostError, match="Send the request again"):
        job.result()


@pytest.mark.usefixtures("mode")
def test_nobody_listens(model: Any):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerUnreachableError, match=address):
        call(model, IDS, embeddings, 2.0, remote=RemoteServer(host=address, patience=0.2))


def test_a_cut_connection_is_asked_again_while_waiting(model: Any, wire: Wire):
    cuts = iter([True, True, True])

    def cut(exchange: Exchange, status: int) -> None:  # noqa: ARG001 - as `after` is called
        if exchange.path.startswith("/response/") and next(cuts, False):
            raise Cut

    wire.after = cut
    value = call(model, IDS, embeddings, 2.0, remote=wire.url)
    assert value.shape == (1, 4, 128)
    assert next(cuts, None) is None
    assert len(wire.jobs()) == 1


# -- the client goes away ------------------------------------------------------------------------

_RESUMES = """
import json, sys
import nnsight, transformers
from nnsight_transcoders import TranscoderSet, attribute
from nnsight_transcoders.remote.calls import Job

task = json.loads(sys.argv[1])
if "job" in task:
    import torch
    torch.save(Job.resume(task["job"], task["remote"]).result(), task["out"])
else:
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["repo_id"])
    model = nnsight.TransformersModel(
        task["repo_id"], task="text-generation", tokenizer=tokenizer
    )
    graph = attribute(
        model,
        TranscoderSet.from_pretrained("builtin/per-layer"),
        task["prompt"],
        remote=task["remote"],
        keep=task["keep"],
    )
    graph.save(task["out"])
"""


@pytest.fixture
def another_client(server: Server, mode: str, tmp_path: Path) -> Callable[..., Path]:
    """Does something in another process of the client; where it put the result."""
    script, out = tmp_path / "client.py", tmp_path / "out"
    script.write_text(_RESUMES)

    def run(**task: Any) -> Path:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.hub_url,
            "HF_HOME": str(tmp_path / "huggingface"),
            "NDIF_API_KEY": mode,
            "NO_PROXY": "127.0.0.1",
        }
        argument = json.dumps({**task, "out": str(out)})
        command = [sys.executable, str(script), argument]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    return run


def test_a_job_is_fetched_after_the_client_was_restarted(
    model: Any, local: Any, wire: Wire, another_client: Callable[..., Path]
):
    job = submit(model, IDS, embeddings, 2.0, remote=wire.url)
    found = torch.load(another_client(job=job.job_id, remote=wire.url))
    torch.testing.assert_close(found, call(local, IDS, embeddings, 2.0))
    assert len(wire.jobs()) == 1


def test_a_graph_is_taken_up_after_the_client_was_restarted(
    model: Any,
    per_layer: TranscoderSet,
    expected: AttributionGraph,
    wire: Wire,
    tmp_path: Path,
    another_client: Callable[..., Path],
):
    keep = tmp_path / "keep"
    graph = submit_graph(model, per_layer, PROMPT, remote=wire.url, keep=keep)
    assert set(graph.job_ids) == {"collect"}
    out = another_client(repo_id=REPO_ID, prompt=PROMPT, remote=wire.url, keep=str(keep))
    assert_same_graph(AttributionGraph.load(out), expected)
    assert len(wire.jobs()) == 2  # this client's, and the edges


# -- the job itself ------------------------------------------------------------------------------


def test_an_error_on_the_server_is_shown_with_its_traceback(model: Any, wire: Wire):
    with pytest.raises(JobFailedError, match="cannot be multiplied") as caught:
        call(model, IDS, fails, 7, remote=wire.url)
    assert "model.model.embed_tokens.output @ torch.zeros(width, width)" in str(caught.value)
    # The server goes on.
    assert call(model, IDS, embeddings, 1.0, remote=wire.url).shape == (1, 4, 128)


def test_a_result_that_takes_too_long_can_be_asked_for_again(model: Any, wire: Wire):
    job = submit(model, IDS, slow_embeddings, 2.0, remote=wire.url)
    with pytest.raises(JobPendingError, match="ask for its result again"):
        job.result(timeout=0)
    assert job.result().shape == (1, 4, 128)
    assert len(wire.jobs()) == 1


def test_a_request_over_the_bound_is_not_sent(model: Any, wire: Wire):
    remote = RemoteServer(host=wire.url, max_bytes=100)
    with pytest.raises(PayloadTooLargeError, match="max_bytes"):
        call(model, IDS, embeddings, 2.0, remote=remote)
    assert wire.jobs() == []


# In the sandbox a module that is not there is None, and only using it is an error.
@pytest.mark.parametrize("mode", ["trusted"], indirect=True)
def test_a_model_of_another_shape_than_the_servers(model: Any, wire: Wire):
    other = nnsight.TransformersModel(
        REPO_ID, task="text-generation", tokenizer=model.tokenizer, num_hidden_layers=5
    )
    with pytest.raises(VersionMismatchError, match=r"nnsight.compare\(\)"):
        call(other, IDS, embeddings, 2.0, remote=wire.url)

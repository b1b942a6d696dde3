"""Jobs that outlive the client, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from loopback import Loopback
from test_remote_graph import PROMPT, assert_same

from nnsight_transcoders import attribute, builtin_model_path
from nnsight_transcoders.circuits.collect import run_parts
from nnsight_transcoders.errors import (
    CheckpointError,
    InputError,
    JobFailedError,
    JobLostError,
    JobPendingError,
    PayloadTooLargeError,
    RemoteError,
    RequestRejectedError,
    ServerUnreachableError,
    VersionMismatchError,
)
from nnsight_transcoders.remote.calls import Job, call, submit
from nnsight_transcoders.remote.failures import job_error
from nnsight_transcoders.remote.keeping import Kept
from nnsight_transcoders.remote.packing import read_packed
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.submitting import submit_graph
from nnsight_transcoders.sites import resolve_sites

IDS = torch.tensor([[1, 5, 9]])


def hasty(server, **options) -> RemoteServer:
    return RemoteServer(server.url, patience=0.0, **options)


# -- without waiting ------------------------------------------------------------------------------


def test_a_graph_without_waiting(own_server, model, local, per_layer):
    own_server.control(hold=True)
    graph = submit_graph(model, per_layer, PROMPT, remote=own_server.url, weights="server")
    assert set(graph.job_ids) == {"collect"} and graph.run is None
    with pytest.raises(JobPendingError, match="goes on") as raised:
        graph.result(timeout=0.2)
    assert raised.value.graph is graph and raised.value.job_id == graph.job_ids["collect"]
    assert "RUNNING" in graph.status()
    own_server.control(hold=False)
    assert_same(graph.result(), attribute(local, per_layer, PROMPT))
    assert not graph.job_ids and graph.n_requests == 2


def test_a_graph_taken_up_by_another_process(own_server, model, local, per_layer, tmp_path):
    """The other process sends the first request and ends; its id is in the folder."""
    keep = tmp_path / "kept"
    code = (
        "import sys\n"
        "from nnsight import TransformersModel\nfrom transformers import AutoTokenizer\n"
        "from nnsight.modeling import huggingface\n"
        "from nnsight_transcoders import TranscoderSet\n"
        "from nnsight_transcoders.remote.submitting import submit_graph\n"
        "path, url, keep, prompt = sys.argv[1:]\n"
        "huggingface._ID_CACHE[path] = 'test/builtin'\n"
        "model = TransformersModel(path, task='text-generation',\n"
        "    tokenizer=AutoTokenizer.from_pretrained(path))\n"
        "set_ = TranscoderSet.from_pretrained('builtin/per-layer')\n"
        "submit_graph(model, set_, prompt, remote=url, weights='server', keep=keep)\n"
    )
    script = tmp_path / "client.py"
    script.write_text(code)
    arguments = [builtin_model_path(), own_server.url, str(keep), PROMPT]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)
    job_id = json.loads((keep / "graph.json").read_text())["jobs"]["collect"][0]
    again = submit_graph(
        model, per_layer, PROMPT, remote=own_server.url, weights="server", keep=keep
    )
    assert again.job_ids["collect"] == job_id
    assert_same(again.result(), attribute(local, per_layer, PROMPT))
    assert again.n_requests == 1  # the first was the other process's
    # A finished folder still has the run: only the edges are asked for.
    third = submit_graph(
        model, per_layer, PROMPT, remote=own_server.url, weights="server", keep=keep
    )
    third.result()
    assert third.n_requests == 1
    with pytest.raises(InputError, match="differs in token_ids"):
        submit_graph(model, per_layer, PROMPT + "3", remote=own_server.url, keep=keep)
    (keep / "run.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="Delete the folder"):
        submit_graph(model, per_layer, PROMPT, remote=own_server.url, keep=keep)


def test_a_part_of_the_edges_is_not_taken_up_by_another_process(tmp_path):
    """It would not know which part it is."""
    kept = Kept(tmp_path, {"token_ids": [1]}, "http://x")
    kept.set_job("edges", "a", 2)
    kept.set_job("part", "b")
    assert kept.jobs == {"edges": ("a", 2), "part": ("b", 0)}
    assert Kept(tmp_path, {"token_ids": [1]}, "http://x").jobs == {"edges": ("a", 2)}


def test_one_job_taken_up_by_its_id(own_server, model):
    own_server.control(hold=True)
    job = submit(model, IDS, read_packed, *arguments(model), remote=own_server.url)
    again = Job.resume(str(job.job_id), own_server.url)
    assert again.status() in ("RUNNING", "QUEUED")
    own_server.control(hold=False)
    # sdpa, which the request asked for, hands out no pattern: that is all the answer says.
    assert again.result() == job.result() == {"without_pattern": 0, "norms": []}
    assert again.status() == "COMPLETED" and again.received_bytes > 100


def arguments(model):
    return run_parts(resolve_sites(model._module)), [2], [], None


# -- faults ---------------------------------------------------------------------------------------


def test_a_server_killed_in_the_middle_of_a_graph(own_server, model, local, per_layer):
    """Phase one is kept; when the server is back only the edges are asked for."""
    graph = submit_graph(model, per_layer, PROMPT, remote=hasty(own_server), weights="server")
    while graph.status() != "collect: COMPLETED":
        time.sleep(0.02)
    collected = own_server.requests()
    own_server.kill()
    with pytest.raises(ServerUnreachableError, match="does not answer") as raised:
        graph.result()
    assert raised.value.graph is graph and graph.run is not None
    with pytest.raises(ServerUnreachableError):  # as often as one likes
        graph.result()
    own_server.start()
    assert len(collected) == 1 and own_server.requests() == []
    assert_same(graph.result(), attribute(local, per_layer, PROMPT))
    assert len(own_server.requests()) == 1


def test_a_server_killed_while_a_job_runs(own_server, model, per_layer):
    """Its last word was that the job runs: the client can stop waiting, and send it again."""
    own_server.control(hold=True)
    graph = submit_graph(model, per_layer, PROMPT, remote=hasty(own_server), weights="server")
    while "RUNNING" not in graph.status():
        time.sleep(0.02)
    own_server.kill()
    with pytest.raises(ServerUnreachableError, match="lost the connection") as raised:
        graph.result()
    assert raised.value.job_id == graph.job_ids["collect"]
    own_server.start()
    with pytest.raises(JobPendingError):
        graph.result(timeout=0.2)
    graph.resubmit()
    assert graph.result().completeness_error < 1e-4


def test_a_restarted_server_that_has_forgotten_a_job(model, local, per_layer):
    server = Loopback(builtin_model_path()).start()  # keeps its answers in memory
    try:
        graph = submit_graph(model, per_layer, PROMPT, remote=server.url, weights="server")
        job = Job.resume(graph.job_ids["collect"], server.url)
        for one in (job, graph):
            while not one.status().endswith(("RUNNING", "COMPLETED")):
                time.sleep(0.01)
        waiting = Job.resume(str(job.job_id), server.url)
        waiting._seen = True  # as one that has asked before
        graph.jobs.job(graph.kept, "collect")._done = False
        server.kill()
        server.start()
        with pytest.raises(JobLostError, match="restarted"):
            waiting.result()
        # A graph sends a lost request again by itself.
        assert_same(graph.result(), attribute(local, per_layer, PROMPT))
        assert graph.n_requests == 3
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("code", "detail", "error", "match"),
    [
        (401, "no key", RequestRejectedError, "NDIF_API_KEY"),
        (400, "Client nnsight version 0.8.1 is below 0.9", VersionMismatchError, "0.9"),
        (413, "too big", PayloadTooLargeError, "no request of this size"),
        (422, "what is this", RequestRejectedError, "what is this"),
        (503, "compute backend is reconnecting", ServerUnreachableError, "cannot serve"),
    ],
)
def test_refusals(own_server, model, per_layer, code, detail, error, match):
    own_server.control(refuse=code, refuse_times=1, detail=detail)
    with pytest.raises(error, match=match) as raised:
        attribute(model, per_layer, PROMPT, remote=hasty(own_server), weights="server")
    assert raised.value.graph.result().completeness_error < 1e-4


def test_a_server_that_cannot_serve_for_a_while_is_tried_again(own_server, model):
    own_server.control(refuse=503, refuse_times=2, detail="later")
    call(model, IDS, read_packed, *arguments(model), remote=own_server.url)
    assert len(own_server.requests()) == 1


def test_no_server(model, per_layer):
    nowhere = RemoteServer("http://127.0.0.1:9", patience=0.3)
    started = time.monotonic()
    with pytest.raises(ServerUnreachableError, match="Is it running"):
        attribute(model, per_layer, PROMPT, remote=nowhere)
    assert time.monotonic() - started < 30


def test_an_error_on_the_server_names_our_line(server, model):
    parts, positions, norms, dtype = arguments(model)
    parts = {**parts, "final_norm": "model.no_such_norm"}
    with pytest.raises(JobFailedError) as raised:
        call(model, IDS, read_packed, parts, positions, norms, dtype, remote=server.url)
    text = str(raised.value)
    assert "raised in this package's nnsight_transcoders/circuits/reads.py, line" in text
    assert "Traceback" in text and "no_such_norm" in text and raised.value.job_id in text


def test_a_request_that_the_server_cannot_rebuild_is_a_matter_of_versions():
    text = "The model architecture on this server doesn't match the one your code was traced"
    error = job_error(text, "abc", "http://x")
    assert isinstance(error, VersionMismatchError) and error.job_id == "abc"
    assert "compare" in str(error)
    plain = job_error("", "abc", "http://x")
    assert isinstance(plain, JobFailedError) and isinstance(plain, RemoteError)


def test_the_size_of_a_request_is_bounded(server, model):
    small = RemoteServer(server.url, max_bytes=1000)
    with pytest.raises(PayloadTooLargeError, match="max_bytes"):
        call(model, IDS, read_packed, *arguments(model), remote=small)

"""An attribution graph of a model that is elsewhere: at most two requests, and resumable.

1. *Collect*: one forward pass on the server; the values that the frozen model needs come back.
2. Features, errors and nodes are found here, layer by layer: the transcoder set stays here.
3. *Edges*: here, if the model's value, output and unembedding weights can be read here; else in a
   second request, for which the vectors of the active features travel up and the edges come back.

What was received is kept, in memory and if asked for in a folder, so that a graph goes on from
there after any failure, also in another process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from nnsight_transcoders.circuits.assemble import assemble
from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.collect import Run, run_parts, token_texts
from nnsight_transcoders.circuits.edge_table import EdgeTable, edge_table
from nnsight_transcoders.circuits.engine import OperatorEngine
from nnsight_transcoders.circuits.expand import expand
from nnsight_transcoders.circuits.freeze import attribution_dtype
from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.circuits.provenance import provenance
from nnsight_transcoders.circuits.remote_run import received_run
from nnsight_transcoders.errors import RemoteError
from nnsight_transcoders.transcoder import dtype_name

from .calls import Step
from .edge_job import graph_edges
from .edges import ChunkedEdges, RemoteEdges, whole_edges
from .graph_jobs import GraphJobs, Part
from .keeping import Kept
from .packing import read_packed
from .payload import (
    ModelShape,
    Payload,
    collect_bytes,
    edges_down_bytes,
    megabytes,
    tensor_bytes,
)
from .prepared import GraphTask, Prepared, prepare, problem_of
from .weights import norm_requests

logger = logging.getLogger(__name__)

#: What a graph asks for, in order.
PHASES = ("collect", "edges")


@contextmanager
def naming(graph: Any) -> Iterator[None]:
    """Within, a remote error says which graph can go on from it."""
    try:
        yield
    except RemoteError as error:
        error.graph = graph
        raise


class RemoteGraph:
    """A graph under way, from ``submit_graph``; ``result`` ends it.

    Args:
        task: What it is of.
        jobs: Sends its requests.
        kept: What it has received.

    Attributes:
        run: The collected run, once it is here.
        kept: What it has received, and the jobs it waits for.
        jobs: Sends its requests.
    """

    def __init__(self, task: GraphTask, jobs: GraphJobs, kept: Kept) -> None:
        self._task, self.jobs, self.kept = task, jobs, kept
        self._prepared: Prepared | None = None
        self._edges: RemoteEdges | None = None
        self._chunk: Part | None = None
        self._answers: list[Any] = []
        self.run: Run | None = None

    def send(self) -> RemoteGraph:
        """Send the first request now, unless it was sent, and do not wait for it.

        Raises:
            RemoteError: It could not be sent; ``error.graph`` is this object.
        """
        with naming(self):
            self.jobs.send("collect", [self])
        return self

    def share(self, jobs: GraphJobs) -> None:
        """Ask for what is still missing in another graph's requests.

        Raises:
            InputError: The other one's model or server is not this one's.
        """
        self.jobs.check_same(jobs)
        self.jobs = jobs

    def resubmit(self) -> RemoteGraph:
        """Give up on the job that is waited for; ``result`` then sends its request again. For a
        job that a restarted server still says is running."""
        for phase in list(self.kept.jobs):
            job = self.jobs.job(self.kept, phase)
            if job is not None:
                self.jobs.forget(job)
        return self

    @property
    def job_ids(self) -> dict[str, str]:
        """Ids of the jobs that are waited for, by phase (``"collect"``, ``"edges"``)."""
        return {phase: job_id for phase, (job_id, _) in self.kept.jobs.items()}

    @property
    def n_requests(self) -> int:
        """How many requests were sent, for this graph and those submitted together with it."""
        return self.jobs.n_requests

    def status(self) -> str:
        """What it waits for, in words.

        Raises:
            RemoteError: A job failed, or the server does not answer.
        """
        for phase in ("collect", "edges", "part"):
            job = self.jobs.job(self.kept, phase)
            if job is not None:
                return f"{phase}: {job.status()}"
        return "not sent" if self.kept.packed is None else "collected"

    def result(self, timeout: float | None = None) -> AttributionGraph:
        """Wait for the graph. It may be called again after any error and goes on from what it has.

        Args:
            timeout: Seconds to wait for each job; default: the server settings'.

        Raises:
            RemoteError: One of its subclasses; its ``graph`` is this object.
            SiteError: The model cannot be written down.
        """
        with naming(self):
            for phase in PHASES:
                self.jobs.fetch(phase, [self], timeout)
            return self.finish(timeout)

    # -- what it asks for, and what it makes of the answers ---------------------------------------

    def part(self, phase: str) -> Part | None:
        """What this graph asks for in a phase; None for nothing (any more)."""
        if phase == "collect":
            return self._collect_part() if self.kept.packed is None else None
        if phase == "part":
            return self._chunk
        return self._edge_part() if self._edges is None else None

    def accept(self, phase: str, answer: Any) -> None:
        """Take what it asked for."""
        if phase == "collect":
            self.kept.set_run(answer)
        elif phase == "part":
            self._chunk = None
            self._answers.append(answer)
        else:
            self._edges = whole_edges(answer, self._prepare().candidates.dtype)

    def finish(self, timeout: float | None) -> AttributionGraph:
        """The graph, when the phases are over. Edges that are computed here are computed now, and
        those that do not fit into one request are asked for in parts."""
        prepared = self._prepare()
        candidates = prepared.candidates
        if prepared.where is not None:
            table = _edges_here(self._task, prepared)
        else:
            edges = self._edges or self._edges_in_parts(prepared, timeout)
            table = edges.table
            chosen = replace(candidates.chosen, direction=edges.direction, bias=edges.target_bias)
            candidates = replace(candidates, chosen=chosen)
        tokens = token_texts(self._task.model, prepared.run.token_ids)
        return assemble(candidates, table, tokens, self._metadata(prepared))

    def _collect_part(self) -> Part:
        task, request, sites = self._task, self._task.request, self._task.sites
        ids = torch.tensor([request.token_ids])
        norms = norm_requests(task.module, sites)
        args = (run_parts(sites), [request.position], norms, task.server.dtype)
        payload = collect_bytes(ModelShape.of(task.module, sites), len(request.token_ids))
        return Part(Step(ids, read_packed, args), payload)

    def _edge_part(self) -> Part | None:
        """The edges in one request; None where they are computed here or it would be too large."""
        task, prepared = self._task, self._prepare()
        if prepared.where is not None:
            return None
        whole, candidates = problem_of(task, prepared).whole(), prepared.candidates
        down = edges_down_bytes(
            candidates.n_features,
            min(candidates.n_features, task.request.max_feature_nodes),
            candidates.n_layers,
            prepared.run.n_positions,
            len(candidates.chosen.names),
        )
        payload, bound = Payload(tensor_bytes(whole), down), task.server.max_bytes
        logger.info("edges: about %s", payload)
        if max(payload.up, payload.down) > bound:
            logger.info("more than max_bytes = %s: edges in parts", megabytes(bound))
            return None
        return Part(Step(prepared.run.token_ids[None], graph_edges, (whole,)), payload)

    def _collected(self) -> Run:
        """The run that came back.

        Raises:
            SiteError: It lacks what a graph needs.
        """
        if self.run is None:
            packed, ids = self.kept.packed, torch.tensor(self._task.request.token_ids)
            assert packed is not None
            self.run = received_run(packed, ids, self._task.sites)
        return self.run

    def _prepare(self) -> Prepared:
        if self._prepared is None:
            run, packed = self._collected(), self.kept.packed
            assert packed is not None
            self._prepared = prepare(self._task, run, packed["norms"])
        return self._prepared

    # -- edges ------------------------------------------------------------------------------------

    def _edges_in_parts(self, prepared: Prepared, timeout: float | None) -> RemoteEdges:
        task, ids = self._task, prepared.run.token_ids[None]
        asked = iter(range(2**31))

        def ask(function: Callable[..., Any], part: dict[str, Any]) -> Any:
            # The same parts in the same order each time: what has come is not asked for again.
            number = next(asked)
            if number == len(self._answers):
                step = Step(ids, function, (part,))
                self._chunk = Part(step, Payload(tensor_bytes(part), 0))
                self.jobs.fetch("part", [self], timeout)
            return self._answers[number]

        chunked = ChunkedEdges(
            problem_of(task, prepared),
            prepared.candidates,
            ask,
            task.request.max_feature_nodes,
            task.server.max_bytes,
            ModelShape.of(task.module, task.sites),
            verbose=task.verbose,
        )
        return chunked.compute()

    def _metadata(self, prepared: Prepared) -> dict[str, Any]:
        task, dtype, jobs = self._task, prepared.run.final.dtype, self.jobs
        return {
            **provenance(task.module, task.sites, task.transcoders, dtype),
            "method": "operator",
            "attribution_dtype": dtype_name(attribution_dtype(dtype)),
            "n_active_features": prepared.candidates.n_features,
            "settings": task.request.settings(),
            "remote": {
                "host": task.server.host or "nnsight's setting",
                "edges": "server" if prepared.where is None else f"client ({prepared.where})",
                "requests": jobs.n_requests,
                "sent_bytes": jobs.sent_bytes,
                "received_bytes": jobs.received_bytes,
            },
        }


def _edges_here(task: GraphTask, prepared: Prepared) -> EdgeTable:
    run, request = prepared.run, task.request
    engine = OperatorEngine(prepared.weights, task.sites, run, task.transcoders)
    chosen = prepared.candidates.chosen
    candidates = Candidates.build(run, prepared.active, chosen, request.position, engine)
    rows, expanded = expand(
        candidates, engine, request.max_feature_nodes, request.memory, verbose=task.verbose
    )
    return edge_table(candidates, rows, expanded)

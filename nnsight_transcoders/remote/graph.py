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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.circuits.active import active_features
from nnsight_transcoders.circuits.assemble import assemble
from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.collect import (
    Run,
    check_patterns,
    run_parts,
    token_texts,
)
from nnsight_transcoders.circuits.edge_table import EdgeTable, edge_table
from nnsight_transcoders.circuits.engine import OperatorEngine
from nnsight_transcoders.circuits.expand import expand
from nnsight_transcoders.circuits.freeze import (
    attribution_dtype,
    check_residual,
    freeze_norms,
    input_values,
    mlp_sides,
)
from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.circuits.layer_features import ActiveFeatures
from nnsight_transcoders.circuits.provenance import dtype_name, provenance
from nnsight_transcoders.circuits.targets import TargetSpec, choose_targets
from nnsight_transcoders.errors import (
    RemoteError,
    SiteError,
)
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .calls import Step
from .edge_job import graph_edges
from .edges import ChunkedEdges, RemoteEdges, whole_edges
from .graph_jobs import GraphJobs, Part
from .keeping import Kept
from .packing import read_packed, unpack_run
from .payload import (
    ModelShape,
    Payload,
    collect_bytes,
    edges_down_bytes,
    megabytes,
    tensor_bytes,
)
from .problem import EdgeProblem, edge_problem
from .request import GraphRequest
from .server import RemoteServer
from .weights import RemoteWeights, norm_requests, projections

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


@dataclass(frozen=True)
class _Prepared:
    """Everything that is known before the edges."""

    weights: RemoteWeights
    where: str | None
    norms: dict[str, Any]
    sides: list[Any]
    inputs: list[Tensor]
    active: ActiveFeatures
    chosen: TargetSpec
    candidates: Candidates


class RemoteGraph:
    """A graph under way, from ``submit_graph``; ``result`` ends it.

    Attributes:
        run: The collected run, once it is here.
        kept: What it has received, and the jobs it waits for.
        jobs: Sends its requests.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        transcoders: TranscoderSet,
        request: GraphRequest,
        jobs: GraphJobs,
        server: RemoteServer,
        sites: Sites,
        weights: str | Path | None,
        kept: Kept,
        verbose: bool,
    ) -> None:
        self._model, self._module, self._transcoders = model, module, transcoders
        self._request, self.jobs, self._server, self._sites = request, jobs, server, sites
        self._weights, self.kept, self._verbose = weights, kept, verbose
        self._prepared: _Prepared | None = None
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
        run, prepared = self._collected(), self._prepare()
        chosen, candidates = prepared.chosen, prepared.candidates
        if prepared.where is not None:
            table = self._edges_here(run, prepared)
        else:
            edges = self._edges or self._edges_in_parts(run, prepared, timeout)
            table = edges.table
            chosen = replace(chosen, direction=edges.direction, bias=edges.target_bias)
            candidates = replace(candidates, chosen=chosen)
        tokens = token_texts(self._model, run.token_ids)
        return assemble(candidates, table, tokens, self._metadata(run, prepared))

    def _collect_part(self) -> Part:
        request, sites = self._request, self._sites
        ids = torch.tensor([request.token_ids])
        norms = norm_requests(self._module, sites)
        args = (run_parts(sites), [request.position], norms, self._server.dtype)
        payload = collect_bytes(ModelShape.of(self._module, sites), len(request.token_ids))
        return Part(Step(ids, read_packed, args), payload)

    def _edge_part(self) -> Part | None:
        """The edges in one request; None where they are computed here or it would be too large."""
        run, prepared = self._collected(), self._prepare()
        if prepared.where is not None:
            return None
        whole, candidates = self._problem(run, prepared).whole(), prepared.candidates
        down = edges_down_bytes(
            candidates.n_features,
            min(candidates.n_features, self._request.max_feature_nodes),
            candidates.n_layers,
            run.n_positions,
            len(prepared.chosen.names),
        )
        payload, bound = Payload(tensor_bytes(whole), down), self._server.max_bytes
        logger.info("edges: about %s", payload)
        if max(payload.up, payload.down) > bound:
            logger.info("more than max_bytes = %s: edges in parts", megabytes(bound))
            return None
        return Part(Step(run.token_ids[None], graph_edges, (whole,)), payload)

    def _collected(self) -> Run:
        """The run that came back.

        Raises:
            SiteError: It lacks what a graph needs.
        """
        if self.run is not None:
            return self.run
        packed = self.kept.packed
        assert packed is not None
        if "without_pattern" in packed:
            path = self._sites.layers[packed["without_pattern"]].attention
            raise SiteError(
                f"the server's {path} handed out no attention pattern: this server does not run "
                "attention in its eager form when a request asks for it (nnsight 0.8 does), or "
                "this attention has no pattern. The model cannot be traced there"
            )
        run = Run(token_ids=torch.tensor(self._request.token_ids), **unpack_run(packed))
        check_patterns(run, self._sites)
        self.run = run
        return run

    # -- features and nodes -----------------------------------------------------------------------

    def _prepare(self) -> _Prepared:
        if self._prepared is not None:
            return self._prepared
        run = self._collected()
        assert self.kept.packed is not None
        found = {
            norm["path"]: probed
            for norm, probed in zip(
                norm_requests(self._module, self._sites), self.kept.packed["norms"], strict=True
            )
        }
        checkpoint, where = None, None
        if self._weights != "server":
            given = None if self._weights == "auto" else self._weights
            checkpoint, where = projections(self._model, self._module, given)
        weights = RemoteWeights(self._module, found, checkpoint)
        norms = freeze_norms(weights, self._sites, run)
        check_residual(self._sites, run, norms)
        sides = mlp_sides(self._sites, run, norms, self._transcoders)
        inputs = input_values(run, sides)
        dtype = attribution_dtype(run.final.dtype)
        final = norms[self._sites.final_norm].forward(run.final.to(dtype))
        active = active_features(run, self._transcoders, inputs, dtype, verbose=self._verbose)
        chosen = self._targets(run, None if where is None else weights, final)
        candidates = _nodes(run, active, chosen, self._request.position)
        self._prepared = _Prepared(weights, where, norms, sides, inputs, active, chosen, candidates)
        logger.info(
            "edges are computed %s",
            "on the server" if where is None else f"here, with weights from {where}",
        )
        return self._prepared

    def _targets(self, run: Run, weights: RemoteWeights | None, final: Tensor) -> TargetSpec:
        request = self._request
        return choose_targets(
            self._model,
            weights,
            self._sites,
            run,
            final[request.position],
            request.targets,
            request.max_n_logits,
            request.desired_logit_prob,
        )

    # -- edges ------------------------------------------------------------------------------------

    def _edges_here(self, run: Run, prepared: _Prepared) -> EdgeTable:
        engine = OperatorEngine(prepared.weights, self._sites, run, self._transcoders)
        position, request = self._request.position, self._request
        candidates = Candidates.build(run, prepared.active, prepared.chosen, position, engine)
        rows, expanded = expand(
            candidates, engine, request.max_feature_nodes, request.memory, verbose=self._verbose
        )
        return edge_table(candidates, rows, expanded)

    def _edges_in_parts(self, run: Run, prepared: _Prepared, timeout: float | None) -> RemoteEdges:
        asked = iter(range(2**31))

        def ask(function: Callable[..., Any], part: dict[str, Any]) -> Any:
            # The same parts in the same order each time: what has come is not asked for again.
            number = next(asked)
            if number == len(self._answers):
                step = Step(run.token_ids[None], function, (part,))
                self._chunk = Part(step, Payload(tensor_bytes(part), 0))
                self.jobs.fetch("part", [self], timeout)
            return self._answers[number]

        chunked = ChunkedEdges(
            self._problem(run, prepared),
            prepared.candidates,
            ask,
            self._request.max_feature_nodes,
            self._server.max_bytes,
            ModelShape.of(self._module, self._sites),
            verbose=self._verbose,
        )
        return chunked.compute()

    def _problem(self, run: Run, prepared: _Prepared) -> EdgeProblem:
        settings = {
            "max_nodes": self._request.max_feature_nodes,
            "memory": self._request.memory,
            "result_dtype": self._server.dtype,
        }
        return edge_problem(
            self._sites,
            run,
            prepared.norms,
            prepared.sides,
            prepared.active,
            prepared.chosen,
            self._request.position,
            settings,
        )

    def _metadata(self, run: Run, prepared: _Prepared) -> dict[str, Any]:
        dtype, jobs = run.final.dtype, self.jobs
        return {
            **provenance(self._module, self._sites, self._transcoders, dtype),
            "method": "operator",
            "attribution_dtype": dtype_name(attribution_dtype(dtype)),
            "n_active_features": prepared.candidates.n_features,
            "settings": self._request.settings(),
            "remote": {
                "host": self._server.host or "nnsight's setting",
                "edges": "server" if prepared.where is None else f"client ({prepared.where})",
                "requests": jobs.n_requests,
                "sent_bytes": jobs.sent_bytes,
                "received_bytes": jobs.received_bytes,
            },
        }


def _nodes(run: Run, active: ActiveFeatures, chosen: TargetSpec, position: int) -> Candidates:
    """The candidate nodes without what only computing edges needs."""
    none = torch.zeros(0, dtype=torch.long)
    layers = [torch.full_like(f.position, number) for number, f in active.layers.items()]
    return Candidates(
        run=run,
        active=active,
        chosen=chosen,
        position=position,
        layer=torch.cat([none, *layers]),
        positions=torch.cat([none, *(f.position for f in active.layers.values())]),
        sources={},
        constants=[],
        final_constants=torch.zeros(0),
    )

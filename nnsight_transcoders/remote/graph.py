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
from collections.abc import Callable
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
from nnsight_transcoders.circuits.edge_table import edge_table
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

from .calls import Job
from .edge_job import graph_edges
from .edges import ChunkedEdges, RemoteEdges, whole_edges
from .graph_jobs import GraphJobs
from .keeping import Kept
from .packing import read_packed, unpack_run
from .payload import ModelShape, edges_down_bytes, megabytes, tensor_bytes
from .problem import EdgeProblem, edge_problem
from .request import GraphRequest
from .server import RemoteServer
from .weights import RemoteWeights, norm_requests, projections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Prepared:
    """Everything that is known before the edges."""

    weights: RemoteWeights
    where: str | None
    norms: dict[str, Any]
    sides: list[Any]
    inputs: list[Tensor]
    final: Tensor
    active: ActiveFeatures


class RemoteGraph:
    """A graph under way, from ``attribute(..., remote=..., blocking=False)``; ``result`` ends it.

    Attributes:
        run: The collected run, once it is here.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        transcoders: TranscoderSet,
        request: GraphRequest,
        server: RemoteServer,
        sites: Sites,
        weights: str | Path | None,
        kept: Kept,
        verbose: bool,
    ) -> None:
        self._model, self._module, self._transcoders = model, module, transcoders
        self._request, self._server, self._sites = request, server, sites
        self._weights, self._kept, self._verbose = weights, kept, verbose
        self._jobs = GraphJobs(model, module, server, kept)
        self._answers: dict[int, Any] = {}
        self._prepared: _Prepared | None = None
        self.run: Run | None = None

    def send(self) -> RemoteGraph:
        """Send the first request now, unless it was sent, and do not wait for it.

        Raises:
            RemoteError: It could not be sent; ``error.graph`` is this object.
        """
        try:
            if self._kept.packed is None:
                self._send_collect()
        except RemoteError as error:
            error.graph = self
            raise
        return self

    def resubmit(self) -> RemoteGraph:
        """Give up on the job that is waited for; ``result`` then sends its request again. For a
        job that a restarted server still says is running."""
        for phase in list(self._kept.jobs):
            self._jobs.forget(phase)
        return self

    @property
    def job_ids(self) -> dict[str, str]:
        """Ids of the jobs that are waited for, by phase (``"collect"``, ``"edges"``)."""
        return dict(self._kept.jobs)

    @property
    def n_requests(self) -> int:
        """How many requests this object has sent."""
        return self._jobs.n_requests

    def status(self) -> str:
        """What it waits for, in words.

        Raises:
            RemoteError: A job failed, or the server does not answer.
        """
        if self._kept.packed is None:
            return f"collect: {self._send_collect().status()}"
        if "edges" in self._kept.jobs:
            return f"edges: {self._jobs.job('edges').status()}"
        return "collected"

    def result(self, timeout: float | None = None) -> AttributionGraph:
        """Wait for the graph. It may be called again after any error and goes on from what it has.

        Args:
            timeout: Seconds to wait for each job; default: the server settings'.

        Raises:
            RemoteError: One of its subclasses; its ``graph`` is this object.
            SiteError: The model cannot be written down.
        """
        try:
            return self._result(timeout)
        except RemoteError as error:
            error.graph = self
            raise

    def _result(self, timeout: float | None) -> AttributionGraph:
        run = self._collected(timeout)
        prepared = self._prepare(run)
        chosen = self._targets(run, prepared)
        candidates = _nodes(run, prepared, chosen, self._request.position)
        if prepared.where is not None:
            edges = self._edges_here(run, prepared, chosen)
        else:
            edges = self._edges_there(run, prepared, chosen, candidates, timeout)
            chosen = replace(chosen, direction=edges.direction, bias=edges.target_bias)
            candidates = replace(candidates, chosen=chosen)
        tokens = token_texts(self._model, run.token_ids)
        return assemble(candidates, edges.table, tokens, self._metadata(run, prepared, candidates))

    # -- the first request ------------------------------------------------------------------------

    def _send_collect(self) -> Job:
        """Send the first request, unless it was sent already."""
        request, sites = self._request, self._sites
        ids = torch.tensor([request.token_ids])
        return self._jobs.send(
            "collect",
            ids,
            read_packed,
            run_parts(sites),
            [request.position],
            norm_requests(self._module, sites),
            self._server.dtype,
        )

    def _collected(self, timeout: float | None) -> Run:
        if self.run is not None:
            return self.run
        if self._kept.packed is None:
            self._kept.set_run(self._jobs.wait("collect", self._send_collect, timeout))
        packed = self._kept.packed
        assert packed is not None
        ids = torch.tensor(self._request.token_ids)
        if "without_pattern" in packed:
            path = self._sites.layers[packed["without_pattern"]].attention
            raise SiteError(
                f"the server's {path} handed out no attention pattern: this server does not run "
                "attention in its eager form when a request asks for it (nnsight 0.8 does), or "
                "this attention has no pattern. The model cannot be traced there"
            )
        run = Run(token_ids=ids, **unpack_run(packed))
        check_patterns(run, self._sites)
        self.run = run
        return run

    # -- features and nodes -----------------------------------------------------------------------

    def _prepare(self, run: Run) -> _Prepared:
        if self._prepared is not None:
            return self._prepared
        assert self._kept.packed is not None
        found = {
            norm["path"]: probed
            for norm, probed in zip(
                norm_requests(self._module, self._sites), self._kept.packed["norms"], strict=True
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
        self._prepared = _Prepared(weights, where, norms, sides, inputs, final, active)
        logger.info(
            "edges are computed %s",
            "on the server" if where is None else f"here, with weights from {where}",
        )
        return self._prepared

    def _targets(self, run: Run, prepared: _Prepared) -> TargetSpec:
        request = self._request
        return choose_targets(
            self._model,
            None if prepared.where is None else prepared.weights,
            self._sites,
            run,
            prepared.final[request.position],
            request.targets,
            request.max_n_logits,
            request.desired_logit_prob,
        )

    # -- edges ------------------------------------------------------------------------------------

    def _edges_here(self, run: Run, prepared: _Prepared, chosen: TargetSpec) -> RemoteEdges:
        engine = OperatorEngine(prepared.weights, self._sites, run, self._transcoders)
        position, request = self._request.position, self._request
        candidates = Candidates.build(run, prepared.active, chosen, position, engine)
        rows, expanded = expand(
            candidates, engine, request.max_feature_nodes, request.memory, verbose=self._verbose
        )
        table = edge_table(candidates, rows, expanded)
        return RemoteEdges(table, chosen.direction, chosen.bias)

    def _edges_there(
        self,
        run: Run,
        prepared: _Prepared,
        chosen: TargetSpec,
        candidates: Candidates,
        timeout: float | None,
    ) -> RemoteEdges:
        problem = self._problem(run, prepared, chosen)
        bound = self._server.max_bytes
        whole = problem.whole()
        up, down = (
            tensor_bytes(whole),
            edges_down_bytes(
                candidates.n_features,
                min(candidates.n_features, self._request.max_feature_nodes),
                candidates.n_layers,
                run.n_positions,
                len(chosen.names),
            ),
        )
        logger.info("edges: about %s up, %s down", megabytes(up), megabytes(down))
        ids = run.token_ids[None]
        if max(up, down) <= bound or "edges" in self._kept.jobs:
            send: Callable[[], Job] = lambda: self._jobs.send("edges", ids, graph_edges, whole)  # noqa: E731
            return whole_edges(self._jobs.wait("edges", send, timeout), candidates.dtype)
        logger.info("more than max_bytes = %s: edges in parts", megabytes(bound))
        asked = iter(range(2**31))

        def ask(function: Callable[..., Any], part: dict[str, Any]) -> Any:
            number = next(asked)
            if number not in self._answers:
                send: Callable[[], Job] = lambda: self._jobs.send("part", ids, function, part)  # noqa: E731
                self._answers[number] = self._jobs.wait("part", send, timeout)
            return self._answers[number]

        chunked = ChunkedEdges(
            problem,
            candidates,
            ask,
            self._request.max_feature_nodes,
            bound,
            ModelShape.of(self._module, self._sites),
            verbose=self._verbose,
        )
        return chunked.compute()

    def _problem(self, run: Run, prepared: _Prepared, chosen: TargetSpec) -> EdgeProblem:
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
            chosen,
            self._request.position,
            settings,
        )

    def _metadata(self, run: Run, prepared: _Prepared, candidates: Candidates) -> dict[str, Any]:
        dtype, jobs = run.final.dtype, self._jobs
        return {
            **provenance(self._module, self._sites, self._transcoders, dtype),
            "method": "operator",
            "attribution_dtype": dtype_name(attribution_dtype(dtype)),
            "n_active_features": candidates.n_features,
            "settings": self._request.settings(),
            "remote": {
                "host": self._server.host or "nnsight's setting",
                "edges": "server" if prepared.where is None else f"client ({prepared.where})",
                "requests": jobs.n_requests,
                "sent_bytes": jobs.sent_bytes,
                "received_bytes": jobs.received_bytes,
            },
        }


def _nodes(run: Run, prepared: _Prepared, chosen: TargetSpec, position: int) -> Candidates:
    """The candidate nodes without what only computing edges needs."""
    active = prepared.active
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

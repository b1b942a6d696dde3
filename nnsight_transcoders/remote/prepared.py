"""What is known of a remote graph before its edges: found here, layer by layer, from its run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnsight_transcoders.circuits.active import active_features
from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.collect import Run
from nnsight_transcoders.circuits.freeze import (
    attribution_dtype,
    check_residual,
    freeze_norms,
    input_values,
    mlp_sides,
)
from nnsight_transcoders.circuits.layer_features import ActiveFeatures
from nnsight_transcoders.circuits.targets import choose_targets
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .problem import EdgeProblem, edge_problem
from .request import GraphRequest
from .server import RemoteServer
from .weights import RemoteWeights, norm_requests, projections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphTask:
    """What a remote graph is of.

    Attributes:
        model: The nnsight model, perhaps without weights.
        module: Its module tree.
        sites: Its sites.
        transcoders: The set.
        request: What was asked for.
        server: Where the model runs.
        weights: ``"auto"``, ``"server"``, or the checkpoint to read edge weights from.
        verbose: Show progress.
    """

    model: Any
    module: nn.Module
    sites: Sites
    transcoders: TranscoderSet
    request: GraphRequest
    server: RemoteServer
    weights: str | Path
    verbose: bool


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the edges.

    Attributes:
        run: The run that came back.
        weights: What can be read here of the model's weights.
        where: Where edge weights are read from, in words; None where the server has to.
        norms: Path of a norm -> what it is frozen to.
        sides: The MLPs' input and output sides.
        active: The active features.
        candidates: The candidate nodes, without what only computing edges needs.
    """

    run: Run
    weights: RemoteWeights
    where: str | None
    norms: dict[str, Any]
    sides: list[Any]
    active: ActiveFeatures
    candidates: Candidates


def prepare(task: GraphTask, run: Run, probed: list[Any]) -> Prepared:
    """Find features, errors and nodes.

    Args:
        task: What the graph is of.
        run: The run that came back.
        probed: What the server's norms compute, in the order of ``norm_requests``.

    Raises:
        SiteError: The run's values do not fit together.
        InputError: A target that cannot be used.
    """
    sites = task.sites
    paths = [norm["path"] for norm in norm_requests(task.module, sites)]
    checkpoint, where = projections(task.model, task.module, task.weights)
    weights = RemoteWeights(task.module, dict(zip(paths, probed, strict=True)), checkpoint)
    norms = freeze_norms(weights, sites, run)
    check_residual(sites, run, norms)
    sides = mlp_sides(sites, run, norms, task.transcoders)
    dtype = attribution_dtype(run.final.dtype)
    final = norms[sites.final_norm].forward(run.final.to(dtype))
    inputs = input_values(run, sides)
    active = active_features(run, task.transcoders, inputs, dtype, verbose=task.verbose)
    chosen = choose_targets(
        task.model,
        None if where is None else weights,
        sites,
        run,
        final[task.request.position],
        task.request.targets,
        task.request.max_n_logits,
        task.request.desired_logit_prob,
    )
    nothing = {"constants": [], "final_constants": torch.zeros(0)}  # only edges need them
    candidates = Candidates.numbered(run, active, chosen, task.request.position, **nothing)
    there = "on the server" if where is None else f"here, with weights from {where}"
    logger.info("edges are computed %s", there)
    return Prepared(run, weights, where, norms, sides, active, candidates)


def problem_of(task: GraphTask, prepared: Prepared) -> EdgeProblem:
    """The edges, as data that a server can compute them from."""
    settings = {
        "max_nodes": task.request.max_feature_nodes,
        "memory": task.request.memory,
        "result_dtype": task.server.dtype,
    }
    return edge_problem(
        task.sites,
        prepared.run,
        prepared.norms,
        prepared.sides,
        prepared.active,
        prepared.candidates.chosen,
        task.request.position,
        settings,
    )

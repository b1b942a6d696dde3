"""Start remote graphs: check what was asked for, here and before anything is sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nnsight_transcoders.circuits.collect import position_in, token_ids_of
from nnsight_transcoders.circuits.edges import MEMORY_BUDGET
from nnsight_transcoders.circuits.targets import Target, check_targets
from nnsight_transcoders.errors import InputError, PayloadTooLargeError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .graph import RemoteGraph
from .graph_jobs import GraphJobs
from .graphs import RemoteGraphs
from .keeping import Kept
from .payload import ModelShape, collect_bytes, megabytes
from .prepared import GraphTask
from .request import GraphRequest
from .server import Remote, RemoteServer, check_remote_model, remote_server

logger = logging.getLogger(__name__)


def submit_graph(
    model: Any,
    transcoders: TranscoderSet,
    prompt: str | Sequence[int] | Tensor,
    *,
    targets: Sequence[Target] | None = None,
    position: int = -1,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int = 7500,
    method: str = "auto",
    sites: Sites | None = None,
    memory: int = MEMORY_BUDGET,
    verbose: bool = False,
    remote: Remote = True,
    weights: str | Path = "auto",
    keep: str | Path | None = None,
    send: bool = True,
) -> RemoteGraph:
    """``attribute(..., remote=...)`` without waiting: the first request is sent, and a handle is
    given back whose ``result()`` is the graph.

    Args:
        model: An nnsight model that the server knows; its weights are not needed here.
        transcoders: See ``attribute``.
        prompt: See ``attribute``.
        targets: See ``attribute``.
        position: See ``attribute``.
        max_n_logits: See ``attribute``.
        desired_logit_prob: See ``attribute``.
        max_feature_nodes: See ``attribute``.
        method: ``"auto"`` or ``"operator"``; gradients are not available remotely.
        sites: See ``attribute``.
        memory: See ``attribute``.
        verbose: See ``attribute``.
        remote: See ``attribute``.
        weights: See ``attribute``.
        keep: See ``attribute``. With it, the same call in another process takes up the graph.
        send: Whether to send the first request at once.

    Raises:
        InputError: A prompt, target, limit or model that cannot be used.
        MismatchError: The set does not fit the model.
        PayloadTooLargeError: The answer would be larger than the bound.
        RemoteError: The request could not be sent; ``error.graph.result()`` tries again.
    """
    server = remote_server(remote)
    if server is None:
        raise InputError("remote=False runs nothing remotely: use attribute()")
    if method not in ("auto", "operator"):
        raise InputError(
            f"method={method!r} is not available remotely, where there are no gradients: leave it "
            "out"
        )
    if max_feature_nodes < 1:
        raise InputError(f"max_feature_nodes must be at least 1, got {max_feature_nodes}")
    check_remote_model(model)
    module = hf_module(model, weights=server.local)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    token_ids = token_ids_of(model, prompt, sites)
    position = position_in(position, len(token_ids))
    check_targets(model, sites, targets, max_n_logits, desired_logit_prob)
    request = GraphRequest(
        token_ids=tuple(token_ids.tolist()),
        targets=targets,
        position=position,
        max_n_logits=max_n_logits,
        desired_logit_prob=desired_logit_prob,
        max_feature_nodes=max_feature_nodes,
        memory=memory,
    )
    _check_size(ModelShape.of(module, sites), len(token_ids), server)
    record = {**request.record(), "model": str(getattr(model, "repo_id", None))}
    kept = Kept(keep, record, server.host)
    task = GraphTask(model, module, sites, transcoders, request, server, weights, verbose)
    graph = RemoteGraph(task, GraphJobs(model, module, server), kept)
    return graph.send() if send else graph


def submit_graphs(
    model: Any,
    transcoders: TranscoderSet,
    prompts: Sequence[str | Sequence[int] | Tensor],
    *,
    keep: str | Path | None = None,
    send: bool = True,
    **options: Any,
) -> RemoteGraphs:
    """Graphs of several prompts in the requests of one (an nnsight session on the server): one
    request collects all runs, and at most one more computes all edges. See ``RemoteGraphs``.

    Args:
        model: See ``submit_graph``.
        transcoders: See ``attribute``.
        prompts: Texts, or token ids ``(T,)``.
        keep: A folder with one folder for each prompt: see ``attribute``.
        send: Whether to send the first request at once.
        **options: Further arguments of ``submit_graph``, for every prompt.

    Raises:
        InputError: No prompt, or an argument that cannot be used.
        MismatchError: The set does not fit the model.
        PayloadTooLargeError: One answer would be larger than the bound.
        RemoteError: The request could not be sent; ``error.graph.result()`` tries again.
    """
    if isinstance(prompts, (str, Tensor)):
        raise InputError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
    graphs = RemoteGraphs(
        [
            submit_graph(
                model,
                transcoders,
                prompt,
                keep=None if keep is None else Path(keep) / str(number),
                send=False,
                **options,
            )
            for number, prompt in enumerate(prompts)
        ]
    )
    return graphs.send() if send else graphs


def _check_size(shape: ModelShape, n_positions: int, server: RemoteServer) -> None:
    expected = collect_bytes(shape, n_positions)
    logger.info("collecting the run takes about %s", expected)
    if expected.down > server.max_bytes:
        raise PayloadTooLargeError(
            f"the run's values take {megabytes(expected.down)}, more than max_bytes = "
            f"{megabytes(server.max_bytes)}: shorten the prompt, ask for "
            "RemoteServer(dtype='bfloat16'), or raise max_bytes"
        )

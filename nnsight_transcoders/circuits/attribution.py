"""``attribute``: from a model, a transcoder set and a prompt to an attribution graph.

The steps are one module each: ``collect`` runs the model once, ``freeze`` writes it down as a
linear map, ``active`` finds features and errors, ``candidates`` numbers the nodes, ``expand``
sweeps for their edges, ``assemble`` makes the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from nnsight_transcoders.attachment.replacement import check_transcodes
from nnsight_transcoders.errors import InputError, SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites
from nnsight_transcoders.transcoder import dtype_name

from .active import Offload, active_features
from .assemble import assemble
from .autograd import AutogradEngine
from .candidates import Candidates, Engine
from .collect import Run, collect, position_in, token_ids_of, token_texts
from .edge_table import edge_table
from .edges import MEMORY_BUDGET
from .engine import OperatorEngine
from .expand import expand
from .graph import AttributionGraph
from .provenance import provenance
from .targets import Target, choose_targets

if TYPE_CHECKING:
    from nnsight_transcoders.remote.server import Remote

logger = logging.getLogger(__name__)

Method = Literal["auto", "operator", "autograd"]


def attribute(
    model: Any,
    transcoders: TranscoderSet,
    prompt: str | Sequence[int] | Tensor,
    *,
    targets: Sequence[Target] | None = None,
    position: int = -1,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int = 7500,
    method: Method = "auto",
    sites: Sites | None = None,
    memory: int = MEMORY_BUDGET,
    offload: Offload | None = None,
    verbose: bool = False,
    remote: Remote | None = None,
    weights: str | Path = "auto",
    keep: str | Path | None = None,
) -> AttributionGraph:
    """The attribution graph of one prompt (Ameisen et al. 2025, "Circuit Tracing").

    Nodes are the active features, one error node per layer and position, the tokens, and the
    targets; an edge is the direct effect of its source on its target with attention patterns,
    normalisation denominators and MLP outputs frozen (docs/concepts.md).

    Args:
        model: An nnsight model (``TransformersModel``, ``LanguageModel`` or ``NNsight``).
        transcoders: A set that fits it; layers without a transcoder become error nodes.
        prompt: Text, or token ids ``(T,)``.
        targets: What to explain: tokens as text or ids, or ``(name, direction)`` pairs with a
            direction ``(d_model,)`` in the space of the unembedding's rows. Default: the fewest
            most likely next tokens that reach ``desired_logit_prob``, at most ``max_n_logits``.
        position: Where the targets stand.
        max_n_logits: See ``targets``.
        desired_logit_prob: See ``targets``.
        max_feature_nodes: At most so many features become nodes, the most influential ones; what
            the others contribute is each node's ``omitted``.
        method: ``"operator"`` writes the frozen model down; ``"autograd"`` differentiates it;
            ``"auto"`` takes the first and falls back to the second where the model's attention
            cannot be written down. The graph's metadata says which was used.
        sites: The model's sites, where they have to be given by hand.
        memory: Bytes for a batch of targets (default 512 MiB).
        offload: Where encoder and decoder rows of the active features wait until they are used:
            on the model's device (None), in the computer's memory (``"cpu"``), or in the set's
            own files (``"disk"``; edge rows are then kept in a temporary file). See
            docs/scaling.md for what is held.
        verbose: Show progress bars.
        remote: Where the model runs (docs/remote.md): True for NDIF, an address, or a
            ``RemoteServer``. The model given here needs no weights then.
        weights: Where the edges of a remote model are computed: here with weights from this
            checkpoint folder or Hub repository; ``"server"`` for there; ``"auto"`` takes weights
            that are at hand (in the model or its folder), else the server.
        keep: A folder that keeps what a remote graph has received; the same call goes on from it.

    Returns:
        The graph; its ``completeness_error`` says how exactly every node's inputs add up. Weights
            are float32 whatever the model's dtype (float64 for a float64 model).

    Raises:
        MismatchError: The set does not fit the model.
        InputError: A prompt, target or limit that cannot be used.
        SiteError: The model's parts were not found or do not fit together.
        RemoteError: A remote request failed; ``error.graph.result()`` goes on from there.
    """
    _check_settings(method, offload, max_feature_nodes, bool(remote))
    if remote:
        from nnsight_transcoders.remote.submitting import submit_graph

        return submit_graph(
            model,
            transcoders,
            prompt,
            targets=targets,
            position=position,
            max_n_logits=max_n_logits,
            desired_logit_prob=desired_logit_prob,
            max_feature_nodes=max_feature_nodes,
            method=method,
            sites=sites,
            memory=memory,
            verbose=verbose,
            remote=remote,
            weights=weights,
            keep=keep,
            send=False,
        ).result()
    module = hf_module(model)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    check_transcodes(transcoders)
    token_ids = token_ids_of(model, prompt, sites)
    position = position_in(position, len(token_ids))
    run = collect(model, sites, token_ids, [position])
    engine, used = _engine(model, module, sites, run, transcoders, method)
    chosen = choose_targets(
        model, module, sites, run, engine.final[position], targets, max_n_logits, desired_logit_prob
    )
    active = active_features(
        run, transcoders, engine.inputs, engine.dtype, offload=offload, verbose=verbose
    )
    candidates = Candidates.build(run, active, chosen, position, engine)
    rows, expanded = expand(
        candidates, engine, max_feature_nodes, memory, offload=offload, verbose=verbose
    )
    metadata = {
        **provenance(module, sites, transcoders, next(module.parameters()).dtype),
        "method": used,
        "attribution_dtype": dtype_name(engine.dtype),
        "n_active_features": candidates.n_features,
        "settings": {
            "max_n_logits": max_n_logits,
            "desired_logit_prob": desired_logit_prob,
            "max_feature_nodes": max_feature_nodes,
            "position": position,
        },
    }
    table = edge_table(candidates, rows, expanded)
    return assemble(candidates, table, token_texts(model, token_ids), metadata)


def _check_settings(method: str, offload: str | None, max_feature_nodes: int, remote: bool) -> None:
    if offload not in (None, *get_args(Offload)):
        raise InputError(f"unknown offload {offload!r}: use 'cpu', 'disk' or None")
    if remote and offload is not None:
        raise InputError("offload= is for graphs of models that are here: leave it out")
    if max_feature_nodes < 1:
        raise InputError(f"max_feature_nodes must be at least 1, got {max_feature_nodes}")
    if method not in get_args(Method):
        raise InputError(f"unknown method {method!r}: use 'auto', 'operator' or 'autograd'")


def _engine(
    model: Any,
    module: nn.Module,
    sites: Sites,
    run: Run,
    transcoders: TranscoderSet,
    method: Method,
) -> tuple[Engine, str]:
    if method != "autograd":
        try:
            return OperatorEngine(module, sites, run, transcoders), "operator"
        except SiteError as error:
            if method == "operator":
                raise
            logger.warning("falling back to autograd: %s", error)
    return AutogradEngine(model, module, sites, run, transcoders), "autograd"

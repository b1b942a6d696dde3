"""One run of the model under interventions: what is asked of the job, and whether its answer holds.

The model is here or on a server: ``intervention_job.py`` is the same for both, and one run is one
request.

Legend: B rows, T positions, D d_model, p kept positions, G targets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import PayloadTooLargeError, SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.norms import TOLERANCE, check_norm
from nnsight_transcoders.remote.calls import call
from nnsight_transcoders.remote.payload import (
    MARGIN,
    ModelShape,
    base_bytes,
    megabytes,
    tensor_bytes,
)
from nnsight_transcoders.remote.problem import narrow
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.shipping import entry_of
from nnsight_transcoders.remote.weights import norm_requests
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import dtype_name

from .collect import eager_attention
from .freeze import attribution_dtype, no_values, not_explained
from .intervention_job import run_interventions
from .intervention_rows import Places

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patching:
    """What responds to an intervention, and where the model is.

    Attributes:
        pinned: Layers whose features and errors are held at those of the first row.
        follow: Layers whose errors are held, while their features follow what they read.
        freeze: Whether attention patterns and normalisation denominators are held.
        server: Where the model is; None for one that is here.
    """

    pinned: frozenset[int]
    follow: frozenset[int]
    freeze: bool
    server: RemoteServer | None


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        position: Where the logits are read.
        tokens: ``(G,)`` the targets' tokens; -1 for directions.
        directions: ``(G, D)``, or None if there are none.
        read: Layer -> the features whose activations are asked for.
        whole_logits: Whether all logits are.
    """

    position: int
    tokens: Tensor
    directions: Tensor | None
    read: Mapping[int, Places]
    whole_logits: bool


class PatchedModel:
    """A model whose runs can be asked for with interventions.

    Args:
        model: An nnsight model; for a remote one, its module tree is enough.
        sites: Its sites.
        transcoders: The set.
        token_ids: The prompt ``(T,)``.
        patching: What responds.
        asked: What is measured.

    Raises:
        SiteError: The attention is to be frozen and cannot be written down.
    """

    def __init__(
        self,
        model: Any,
        sites: Sites,
        transcoders: TranscoderSet,
        token_ids: Tensor,
        patching: Patching,
        asked: Asked,
    ) -> None:
        self.model, self.sites, self.transcoders = model, sites, transcoders
        self.token_ids, self.patching, self.asked = token_ids, patching, asked
        self.module: nn.Module = hf_module(model, weights=patching.server is None)
        self.model_dtype = next(self.module.parameters()).dtype
        self.dtype = attribution_dtype(self.model_dtype)
        if patching.freeze:
            for layer in sites.layers:
                if layer.value is None:
                    raise no_values(layer)

    def ask(
        self,
        n_rows: int,
        parts: Mapping[int, dict[str, Any]],
        vectors: Mapping[int, dict[str, Tensor]],
        tokens: dict[str, Tensor] | None,
        kept: Mapping[int, Tensor],
        until: int | None,
    ) -> dict[str, Any]:
        """One run of the model, in one request if it is elsewhere.

        Args:
            n_rows: B.
            parts: Layer -> what the job gets of its transcoder.
            vectors: Layer -> what to add at its output site, at which rows and positions.
            tokens: Which tokens to multiply.
            kept: Layer -> positions at which the value that its transcoder reads comes back.
            until: Go no further than this layer's transcoder.

        Raises:
            SiteError: A norm, or an attention that is to be frozen, cannot be written down.
            RemoteError: The server, or the job there, failed.
        """
        problem = {
            **self._context,
            "layers": [self._layer(n, parts, vectors, kept) for n in range(self.sites.n_layers)],
            "tokens": tokens,
            "until": until,
        }
        server, ids = self.patching.server, self.token_ids.expand(n_rows, -1)
        if server is None:
            ids = ids.to(next(self.module.parameters()).device)
        else:
            problem = _narrowed(problem)
            self._check_size(problem, n_rows, server)
        eager = eager_attention(self.module) if self.patching.freeze else nullcontext()
        with eager, torch.no_grad():
            answer = call(
                self.model,
                ids,
                run_interventions,
                problem,
                remote=server,
                stop=until is not None or not self.asked.whole_logits,
                use_cache=False,
            )
        self._check(answer)
        return answer

    @cached_property
    def _context(self) -> dict[str, Any]:
        """What is the same for every batch."""
        sites, asked, server = self.sites, self.asked, self.patching.server
        norms = norm_requests(self.module, sites)
        if not self.patching.freeze:  # only those that the job divides by itself
            configs = {n: self.transcoders.config(n) for n in self.transcoders.layers}
            n0 = [sites.layers[n].mlp_norm for n, c in configs.items() if c.input_site == "N0"]
            norms = [norm for norm in norms if norm["path"] in n0]
        return {
            "embed": sites.embed,
            "position_embed": sites.position_embed,
            "final_norm": sites.final_norm,
            "unembed": sites.unembed,
            "parallel": sites.parallel,
            "d_model": sites.d_model,
            "heads": (sites.n_value_heads, sites.head_dim),
            "dtype": dtype_name(self.dtype),
            "freeze": self.patching.freeze,
            "norms": norms,
            "position": asked.position,
            "targets": {"tokens": asked.tokens, "directions": asked.directions},
            "whole_logits": asked.whole_logits,
            "logits_dtype": None if server is None else server.dtype,
        }

    def _layer(
        self,
        number: int,
        parts: Mapping[int, dict[str, Any]],
        vectors: Mapping[int, dict[str, Tensor]],
        kept: Mapping[int, Tensor],
    ) -> dict[str, Any]:
        """What the job is told of a layer."""
        config = self.transcoders.config(number) if number in self.transcoders else None
        return {
            **asdict(self.sites.layers[number]),
            "input_site": None if config is None else config.input_site,
            # An error without a transcoder is all that the layer adds to the stream.
            "output_site": "O'" if config is None else config.output_site,
            "held": number in self.patching.pinned | self.patching.follow,
            "transcoder": parts.get(number),
            "vectors": vectors.get(number),
            "kept": kept.get(number),
        }

    def _check_size(self, problem: dict[str, Any], n_rows: int, server: RemoteServer) -> None:
        """Say what travels, and refuse what is too much.

        Raises:
            PayloadTooLargeError: The request or its answer would be.
        """
        n_read = sum(len(index) for _, index in self.asked.read.values())
        n_read += sum(
            self.sites.d_model * len(one["kept"])
            for one in problem["layers"]
            if one["kept"] is not None
        )
        whole = self.sites.vocab_size * self.model_dtype.itemsize if self.asked.whole_logits else 0
        up = tensor_bytes(problem) + base_bytes(
            ModelShape.of(self.module, self.sites), entry_of(run_interventions)
        )
        down = n_rows * (self.dtype.itemsize * n_read + whole)
        logger.info("intervention: about %s up, %s down", megabytes(up), megabytes(down))
        if max(up, down) * MARGIN <= server.max_bytes:
            return
        advice = "change fewer features, or read fewer (read=[...])"
        if down > up:
            advice = "make fewer interventions at a time, or read fewer features (read=[...])"
        raise PayloadTooLargeError(
            f"this intervention takes about {megabytes(up)} up and {megabytes(down)} down, more "
            f"than the bound of {megabytes(server.max_bytes)}: {advice}, or raise it with "
            "RemoteServer(max_bytes=...)"
        )

    def _check(self, answer: Mapping[str, Any]) -> None:
        limit = TOLERANCE[self.model_dtype]
        for norm, difference in zip(self._context["norms"], answer["norms"], strict=True):
            check_norm(norm["path"], difference, limit)
        for layer, difference in zip(self.sites.layers, answer["attention"], strict=False):
            if difference is None:
                raise SiteError(
                    f"{layer.attention} handed out no attention pattern, so that it cannot be "
                    "frozen: use freeze_attention=False"
                )
            if not difference <= limit:
                raise not_explained(layer, difference)


def _narrowed(data: Any) -> Any:
    """Plain data with every tensor on the CPU, in the narrowest dtype that holds it exactly."""
    if isinstance(data, Tensor):
        return narrow(data.cpu())
    if isinstance(data, dict):
        return {key: _narrowed(value) for key, value in data.items()}
    return [_narrowed(value) for value in data] if isinstance(data, list) else data

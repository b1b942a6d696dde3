"""A run of a remote model, frozen here: for taking targets apart (``contributions.py``).

The run's values, its attention patterns among them, come back in one request. What each head does
with them takes its value and output maps: read from the model's checkpoint, where that is at hand;
else they stay on the server, which is asked for each target's contributions (``remote_heads.py``).
Few things need the maps themselves; for them they are asked for, once for all layers (``2 D^2``
numbers a layer, fewer under grouped-query attention). The transcoders stay here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.remote.calls import call
from nnsight_transcoders.remote.packing import read_packed, unpack_run
from nnsight_transcoders.remote.payload import megabytes
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.weights import (
    Checkpoint,
    RemoteWeights,
    norm_requests,
    projections,
)
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import dtype_name

from .attention_weights import Linear
from .collect import Run, check_patterns, eager_attention, run_parts
from .invariant_job import linear_maps, unembedding_rows
from .scores_job import attention_call, rows_of_maps

logger = logging.getLogger(__name__)


class ServerWeights(RemoteWeights):
    """``RemoteWeights`` that asks the server for what is not at hand.

    Args:
        model: The nnsight model.
        module: Its module tree.
        sites: Its sites.
        norms: Path -> what ``probe_norm`` found.
        checkpoint: Where its projections can be read; None if they are not.
        server: Where the model is.
        ids: Token ids ``(1, T)`` to run it on.
        on_client: Whether the projections can be read here, in the checkpoint or the module.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        sites: Sites,
        norms: Mapping[str, Mapping[str, Any]],
        checkpoint: Checkpoint | None,
        server: RemoteServer,
        ids: Tensor,
        *,
        on_client: bool,
    ) -> None:
        super().__init__(module, norms, checkpoint)
        self.on_client = on_client
        self._model, self._sites, self._server, self._ids = model, sites, server, ids
        self._received: dict[str, Linear] = {}
        self._calls: dict[str, dict[str, Any]] = {}
        self._rows: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def fetch_attention(self) -> None:
        """Ask for every layer's value and output maps, in as few requests as ``max_bytes`` lets;
        for nothing where they are at hand."""
        if self.on_client or self._received:
            return
        for layer in self._sites.layers:
            if layer.value is None:
                raise SiteError(
                    f"{layer.attention} has no module that makes the values: its heads cannot be "
                    "taken apart"
                )
        sizes = {path: self._bytes(path) for path, _ in self._maps()}
        logger.info("asking the server for its attention maps: %s", megabytes(sum(sizes.values())))
        for part in self._parts(sizes):
            found = self._call(self._ids, linear_maps, self._sites.embed, part, self._server.dtype)
            self._received.update({path: one for (path, _), one in zip(part, found, strict=True)})

    def linear(self, path: str, width: int, dtype: torch.dtype) -> Linear:
        """See ``ModelWeights.linear``."""
        if path not in self._received:
            return super().linear(path, width, dtype)
        weight, bias = self._received[path]
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def attention_call(
        self, path: str, linears: Sequence[str], norms: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``scores_job.attention_call`` tells of an attention in this run, asked for once."""
        if path not in self._calls:
            self._calls[path] = self.ask(attention_call, path, list(linears), list(norms))
        return self._calls[path]

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a shipped function on the server's run of the prompt, attention in its eager form."""
        with eager_attention(self._module):
            return self._call(self._ids, function, *args, use_cache=False)

    def _call(self, ids: Tensor, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a shipped function there; what it gives comes back in the dtype that it has."""
        server = replace(self._server, dtype=None)
        return call(self._model, ids, function, *args, remote=server, stop=True, **options)

    def rows(
        self, wanted: Sequence[tuple[str, Sequence[int]]], width: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """Rows ``(n, width)`` of some linear maps' weights; what is not at hand is asked for, once
        and together.

        Args:
            wanted: Path and rows of each.
            width: Of the input of all of them.
            dtype: Of the result.
        """
        here = {path for path, _ in wanted if path in self._received or self.on_client}
        keys = [(path, tuple(rows)) for path, rows in wanted]
        missing = [key for key in keys if key[0] not in here and key not in self._rows]
        if missing:
            asked = [(path, list(rows)) for path, rows in missing]
            embed, name = self._sites.embed, self._server.dtype
            found = self._call(self._ids[:, :1], rows_of_maps, embed, asked, width, name)
            self._rows.update(zip(missing, found, strict=True))
        return [
            self.linear(path, width, dtype)[0][list(rows)]
            if path in here
            else self._rows[path, rows].to(dtype)
            for path, rows in keys
        ]

    def has_bias(self, *paths: str | None) -> bool:
        """Whether any of some linear maps has a bias, by the module tree."""
        modules = [self._module.get_submodule(path) for path in paths if path]
        return any(getattr(module, "bias", None) is not None for module in modules)

    def logit_directions(self, tokens: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Demeaned rows of the unembedding ``(n, D)`` and their biases, made on the server."""
        paths = (self._sites.embed, self._sites.unembed)
        return self._call(
            self._ids[:, :1], unembedding_rows, *paths, list(tokens), dtype_name(dtype)
        )

    def _maps(self) -> list[tuple[str, int]]:
        sites, found = self._sites, []
        for layer in sites.layers:
            assert layer.value is not None
            found.append((layer.value, sites.d_model))
            found.append((layer.out_proj, sites.n_heads * sites.head_dim))
        return found

    def _bytes(self, path: str) -> int:
        weight: Any = self._module.get_submodule(path).weight
        return weight.numel() * weight.element_size()

    def _parts(self, sizes: Mapping[str, int]) -> Iterator[list[tuple[str, int]]]:
        part: list[tuple[str, int]] = []
        total = 0
        for one in self._maps():
            if part and total + sizes[one[0]] > self._server.max_bytes:
                yield part
                part, total = [], 0
            part.append(one)
            total += sizes[one[0]]
        yield part


def received_run(packed: dict[str, Any], token_ids: Tensor, sites: Sites) -> Run:
    """A run from what ``packing.read_packed`` gave.

    Args:
        packed: Its answer.
        token_ids: The prompt ``(T,)``.
        sites: The model's sites.

    Raises:
        SiteError: It lacks attention patterns.
    """
    if "without_pattern" in packed:
        path = sites.layers[packed["without_pattern"]].attention
        raise SiteError(
            f"the server's {path} handed out no attention pattern: this server does not run "
            "attention in its eager form when a request asks for it (nnsight 0.8 does), or "
            "this attention has no pattern. The model cannot be traced there"
        )
    run = Run(token_ids=token_ids, **unpack_run(packed))
    check_patterns(run, sites)
    return run


def collect_remote(
    model: Any,
    module: nn.Module,
    sites: Sites,
    token_ids: Tensor,
    server: RemoteServer,
    weights: str | Path | None = None,
) -> tuple[Run, ServerWeights]:
    """One prompt's values at every layer, with logits everywhere, and the model's weights.

    Args:
        model: The nnsight model.
        module: Its module tree.
        sites: Its sites.
        token_ids: ``(T,)``.
        server: Where it is.
        weights: A folder or Hub repository with its checkpoint; ``"server"``: do not look for one.

    Raises:
        SiteError: The server hands out no attention patterns, or the weights do not fit.
        RemoteError: The server, or a job there, failed.
    """
    ids = token_ids[None]
    norms = norm_requests(module, sites)
    with eager_attention(module):
        packed = call(
            model,
            ids,
            read_packed,
            run_parts(sites),
            list(range(len(token_ids))),
            norms,
            server.dtype,
            remote=server,
        )
    run = received_run(packed, token_ids, sites)
    found = {norm["path"]: one for norm, one in zip(norms, packed["norms"], strict=True)}
    checkpoint, where = projections(model, module, weights)
    on_client = where is not None
    there = ServerWeights(model, module, sites, found, checkpoint, server, ids, on_client=on_client)
    return run, there

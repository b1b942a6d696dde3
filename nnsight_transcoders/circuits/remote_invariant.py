"""``InvariantModel`` of a model that is on a server: products are computed there."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.models import hf_module
from nnsight_transcoders.norms import TOLERANCE, NormSpec, spec_of_probe
from nnsight_transcoders.remote.calls import call
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.weights import epsilons, norm_requests
from nnsight_transcoders.sites import Sites, resolve_sites
from nnsight_transcoders.transcoder import dtype_name

from .collect import Run, eager_attention
from .freeze import attribution_dtype, no_values, not_explained
from .invariant import Head, InvariantModel
from .invariant_job import (
    TokenLists,
    called_norms,
    head_maps,
    joined_lists,
    listed_tokens,
    logit_products,
    through_heads,
    token_products,
)
from .linear import FrozenNorm
from .ov import OVCircuit
from .remote_run import collect_remote


class RemoteInvariantModel(InvariantModel):
    """Norms, OV circuits and the vocabulary of a remote model.

    Norms are asked for once, all together: ``2 L D`` numbers. Everything else sends vectors and
    gets vectors, or their products with the vocabulary.

    Args:
        model: An nnsight model whose module tree is enough.
        sites: Its sites, where they have to be given by hand.
        server: Where it is.
    """

    def __init__(self, model: Any, sites: Sites | None, server: RemoteServer) -> None:
        self._model, self._server = model, server
        self.module = hf_module(model, weights=False)
        self.sites = sites or resolve_sites(self.module)
        self._model_dtype = next(self.module.parameters()).dtype
        self.dtype = attribution_dtype(self._model_dtype)
        self.device = torch.device("cpu")

    def norm(self, path: str) -> FrozenNorm:
        """See ``InvariantModel.norm``."""
        spec = self._spec(path)
        gain = spec.gain.to(self.dtype)
        return FrozenNorm(gain, None, gain.new_ones(1, 1), spec.centred)

    def _spec(self, path: str) -> NormSpec:
        return spec_of_probe(path, self._norms_there[path], TOLERANCE[self._model_dtype])

    def push(self, head: Head, vectors: Tensor) -> Tensor:
        """See ``InvariantModel.push``."""
        return self._through(head, vectors, False)

    def pull(self, head: Head, vectors: Tensor) -> Tensor:
        """See ``InvariantModel.pull``."""
        return self._through(head, vectors, True)

    def on_tokens(self, vectors: Tensor) -> Tensor:
        """See ``InvariantModel.on_tokens``."""
        n_tokens, scale = self.sites.vocab_size, self._embed_scale
        return self._call(token_products, self.sites.embed, self.cast(vectors), n_tokens, scale)

    def on_logits(self, vectors: Tensor) -> Tensor:
        """See ``InvariantModel.on_logits``."""
        paths = (self.sites.embed, self.sites.unembed)
        return self._call(logit_products, *paths, self.cast(vectors))

    def token_lists(self, written: Tensor, read: Tensor, top: int) -> TokenLists:
        """See ``InvariantModel.token_lists``; only the lists come back."""
        final = self.norm(self.sites.final_norm).fold_out(self.cast(written))
        read, paths = self.cast(read), (self.sites.embed, self.sites.unembed)
        per_request = max(1, self._server.max_bytes // (3 * final[:1].nbytes))
        return joined_lists(
            [
                self._call(
                    listed_tokens,
                    paths,
                    final[at],
                    read[at],
                    self.sites.vocab_size,
                    self._embed_scale,
                    top,
                )
                for at in torch.arange(len(final)).split(per_request)
            ]
        )

    @property
    def _embed_scale(self) -> float:
        """What the embedding module multiplies its weights by (Gemma)."""
        embed: Any = self.module.get_submodule(self.sites.embed)
        return float(getattr(embed, "scalar_embed_scale", 1.0))

    @cached_property
    def _norms_there(self) -> dict[str, Any]:
        norms = norm_requests(self.module, self.sites)
        found = self._call(called_norms, self.sites.embed, norms)
        return {norm["path"]: one for norm, one in zip(norms, found, strict=True)}

    def ov(self, head: Head) -> OVCircuit:
        """See ``InvariantModel.ov``: of one head, its ``2 E D`` numbers come back."""
        value, out = self._in_eager_attention(head, head_maps)
        return OVCircuit(head[0], self.cast(value), self.cast(out))

    def norm_spec(self, path: str, x: Tensor) -> NormSpec:
        """See ``InvariantModel.norm_spec``."""
        del x
        return self._spec(path)

    def run(self, token_ids: Tensor) -> Run:
        """See ``InvariantModel.run``: one request."""
        return collect_remote(self._model, self.module, self.sites, token_ids, self._server)[0]

    def _through(self, head: Head, vectors: Tensor, transposed: bool) -> Tensor:
        return self._in_eager_attention(head, through_heads, self.cast(vectors), transposed)[0]

    def _in_eager_attention(self, head: Head, function: Any, *args: Any) -> list[Any]:
        """Run a function of some heads there; what it gives but for the difference, which must be
        small."""
        self.check_head(head)
        number, index = head
        sites, layer = self.sites, self.sites.layers[number]
        if layer.value is None:
            raise no_values(layer)
        roles = {"before": layer.attention_norm, "after": layer.attention_post_norm}
        spec = {
            "embed": sites.embed,
            "layer": asdict(layer),
            "norms": {role: self._probe_of(path) for role, path in roles.items()},
            "heads": (sites.n_value_heads, sites.head_dim),
            "n_heads": sites.n_heads,
            "chosen": list(range(sites.n_heads)) if index is None else [index],
            "out_width": sites.n_heads * sites.head_dim,
            "dtype": dtype_name(self.dtype),
        }
        with eager_attention(self.module):
            *found, difference = self._call(function, spec, *args)
        if not difference <= TOLERANCE[self._model_dtype]:
            raise not_explained(layer, difference)
        return found

    def _probe_of(self, path: str | None) -> dict[str, Any] | None:
        if path is None:
            return None
        eps = epsilons(self.module.get_submodule(path))
        return {"path": path, "width": self.sites.d_model, "eps": eps}

    def _call(self, function: Any, *args: Any) -> Any:
        ids = torch.linspace(0, self.sites.vocab_size - 1, 4).long()[None]
        server = replace(self._server, dtype=None)
        return call(self._model, ids, function, *args, remote=server, stop=True)

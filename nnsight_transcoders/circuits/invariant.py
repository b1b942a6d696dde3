"""The input-invariant half of the frozen model: rows in the stream, and OV circuits.

What a transcoder's rows are as vectors of the residual stream, and what one attention head does
with such a vector, does not depend on the input once norms count with their gain and centring and
without their denominators, and attention patterns are left out (section 4.1 of Dunefsky, Chlenski,
Nanda 2024). ``virtual_weights.py`` multiplies what is made here.

Legend: n vectors, D d_model, F features of a layer, W layers written to, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.attachment.replacement import check_transcodes
from nnsight_transcoders.errors import InputError, SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.norms import NormSpec, norm_spec, probed_spec
from nnsight_transcoders.remote.server import Remote, remote_server
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .collect import Run, collect
from .freeze import MlpSide, attribution_dtype, freeze, freeze_norms
from .invariant_job import PRODUCT_ELEMENTS, TokenLists, joined_lists, token_lists
from .linear import FrozenNorm
from .model_weights import linear_weight
from .ov import OVCircuit, head_circuit

#: An attention layer and one of its heads, or all of them together.
Head = tuple[int, int | None]


class InvariantModel:
    """A model's norms and OV circuits without what depends on the input.

    Args:
        model: An nnsight model.
        sites: Its sites, where they have to be given by hand.
    """

    def __init__(self, model: Any, sites: Sites | None = None) -> None:
        self._model = model
        self.module = hf_module(model)
        self.sites = sites or resolve_sites(self.module)
        embedding: Any = self.module.get_submodule(self.sites.embed)
        self.dtype = attribution_dtype(embedding.weight.dtype)
        self.device = embedding.weight.device
        self._norms: dict[str, FrozenNorm] = {}

    def norm(self, path: str) -> FrozenNorm:
        """A norm with its denominators at one and without its bias."""
        if path not in self._norms:
            spec = probed_spec(self.module, path, self.sites.d_model)
            gain = spec.gain.to(self.device, self.dtype)
            self._norms[path] = FrozenNorm(gain, None, gain.new_ones(1, 1), spec.centred)
        return self._norms[path]

    def norm_spec(self, path: str, x: Tensor) -> NormSpec:
        """What a norm computes, checked on values ``(T, D)`` that it reads."""
        return norm_spec(self.module.get_submodule(path), path, x)

    def run(self, token_ids: Tensor) -> Run:
        """A run of the model on a prompt ``(T,)``."""
        return collect(self._model, self.sites, token_ids)

    def read_norm(self, transcoders: TranscoderSet, layer: int) -> FrozenNorm | None:
        """The norm between the stream and a layer's input site.

        Raises:
            SiteError: A transcoder reads site N0 where there is no norm before the MLP.
            InputError: It is a set of autoencoders, which do not read the stream.
        """
        check_transcodes(transcoders)
        config, path = transcoders.config(layer), self.sites.layers[layer].mlp_norm
        if config.input_site == "R":
            return None
        if path is None:
            if config.input_site == "N0":
                raise SiteError(f"layer {layer}'s transcoder reads site N0, but there is no norm")
            return None
        norm = self.norm(path)
        plain = config.input_site == "N0"
        return replace(norm, gain=torch.ones_like(norm.gain)) if plain else norm

    def write_norm(self, transcoders: TranscoderSet, layer: int) -> FrozenNorm | None:
        """The norm between a layer's output site and the stream."""
        path = self.sites.layers[layer].mlp_post_norm
        return self.norm(path) if path and transcoders.config(layer).output_site == "O" else None

    def cast(self, vectors: Tensor) -> Tensor:
        """Vectors where and as everything is computed."""
        return vectors.detach().to(self.device, self.dtype)

    def read(self, transcoders: TranscoderSet, layer: int, rows: Tensor) -> Tensor:
        """Encoder rows ``(n, D)`` of a layer as they read the stream."""
        norm, rows = self.read_norm(transcoders, layer), self.cast(rows)
        return rows if norm is None else norm.fold_in(rows)

    def written(self, transcoders: TranscoderSet, target: int, rows: Tensor) -> Tensor:
        """Decoder rows ``(n, D)`` for layer ``target``'s output as they stand in the stream."""
        norm, rows = self.write_norm(transcoders, target), self.cast(rows)
        return rows if norm is None else norm.fold_out(rows)

    def written_below(
        self, transcoders: TranscoderSet, source: int, rows: Tensor, limit: int
    ) -> Tensor:
        """What decoder rows ``(n, D)`` or ``(n, W, D)`` of layer ``source`` put into the stream by
        their writes at layers below ``limit``: ``(n, D)``."""
        slots = rows[:, None] if rows.dim() == 2 else rows
        total = torch.zeros(len(rows), rows.shape[-1], dtype=self.dtype, device=self.device)
        for j, target in enumerate(transcoders.targets(source)):
            if target < limit:
                total += self.written(transcoders, target, slots[:, j])
        return total

    # -- what can reach what ---------------------------------------------------------------------

    def limit(self, target: int, head: Head | None) -> int:
        """Writes at layers below this one reach layer ``target``'s features directly, or through
        ``head``; 0 where nothing does."""
        if head is None:
            return target
        n_attention = target if self.sites.parallel else target + 1
        return head[0] if head[0] < n_attention else 0

    def check_head(self, head: Head) -> None:
        """Check that the model has a head.

        Raises:
            InputError: It has not.
        """
        layer, index = head
        if not 0 <= layer < self.sites.n_layers:
            raise InputError(f"the model has layers 0 to {self.sites.n_layers - 1}, not {layer}")
        if index is not None and not 0 <= index < self.sites.n_heads:
            raise InputError(f"the model has heads 0 to {self.sites.n_heads - 1}, not {index}")

    # -- attention -------------------------------------------------------------------------------

    def ov(self, head: Head) -> OVCircuit:
        """A head's OV circuit, or that of all heads of a layer (each paying full attention).

        Raises:
            InputError: No such layer or head.
            SiteError: This attention is not pattern x values x output.
        """
        self.check_head(head)
        number, index = head
        run, norms = self._probe
        one = replace(self.sites, layers=(self.sites.layers[number],))
        frozen = freeze(
            self.module, one, _cut(run, number), norms, [MlpSide("R", None, None, None)]
        )
        layer = frozen.layers[0]
        heads = range(self.sites.n_heads) if index is None else [index]
        circuit = head_circuit(
            number,
            layer.attention,
            layer.attention_norm,
            layer.attention_post_norm,
            heads,
            self.sites.n_heads,
        )
        return OVCircuit(number, self.cast(circuit.value), self.cast(circuit.out))

    def push(self, head: Head, vectors: Tensor) -> Tensor:
        """Vectors ``(n, D)`` before attention through a head's OV circuit."""
        return self.ov(head).forward(self.cast(vectors))

    def pull(self, head: Head, vectors: Tensor) -> Tensor:
        """Cotangents ``(n, D)`` after attention through its transpose."""
        return self.ov(head).pull_back(self.cast(vectors))

    @cached_property
    def _probe(self) -> tuple[Run, dict[str, FrozenNorm]]:
        """A run of a few tokens, on which the reading of the weights is checked."""
        ids = torch.linspace(0, self.sites.vocab_size - 1, 4).long()
        run = self.run(ids)
        return run, freeze_norms(self.module, self.sites, run)

    # -- the vocabulary --------------------------------------------------------------------------

    def on_tokens(self, vectors: Tensor) -> Tensor:
        """Products of vectors ``(n, D)`` with every token's embedding: ``(n, V)``."""
        module: Any = self.module.get_submodule(self.sites.embed)
        return self.cast(vectors) @ self.cast(module.weight).T

    def on_logits(self, vectors: Tensor) -> Tensor:
        """Products of vectors ``(n, D)`` with every row of the unembedding: ``(n, V)``."""
        module = self.module.get_submodule(self.sites.unembed)
        weight = linear_weight(module, self.sites.d_model, self.dtype)[0]
        return self.cast(vectors) @ self.cast(weight).T

    def token_lists(self, written: Tensor, read: Tensor, top: int) -> TokenLists:
        """The tokens that vectors raise, lower and read most.

        Args:
            written: ``(n, D)`` vectors in the stream, such as ``write_vectors``: their direct
                effect on the logits, less its mean, makes ``top_logits`` and ``bottom_logits``.
            read: ``(n, D)`` vectors that read the stream: their products with the tokens'
                embeddings make ``de_embedding``.
            top: How many tokens, k.

        Returns:
            For each of these names, values and token ids ``(n, k)``, on the CPU.
        """
        final = self.norm(self.sites.final_norm).fold_out(self.cast(written))
        read = self.cast(read)
        parts = []
        for at in torch.arange(len(final)).split(max(1, PRODUCT_ELEMENTS // self.sites.vocab_size)):
            found = token_lists(self.on_logits(final[at]), self.on_tokens(read[at]), top)
            parts.append({name: (v.cpu(), i.cpu()) for name, (v, i) in found.items()})
        return joined_lists(parts)


def invariant_model(
    model: Any, sites: Sites | None = None, remote: Remote | None = None
) -> InvariantModel:
    """The ``InvariantModel`` of a model that is here, or of one on a server."""
    server = remote_server(remote)
    if server is None:
        return InvariantModel(model, sites)
    from .remote_invariant import RemoteInvariantModel

    return RemoteInvariantModel(model, sites, server)


def _cut(run: Run, layer: int) -> Run:
    """A run of one layer of another run."""
    after = run.resid[layer + 1] if layer + 1 < len(run.resid) else run.final
    parts = {
        name: [getattr(run, name)[layer]]
        for name in ("resid", "pattern", "attended", "mid", "mlp_in", "mlp_out", "mlp_post")
    }
    return replace(run, position_embedding=None, final=after, **parts)

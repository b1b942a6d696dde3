"""One target taken apart: what each token, feature, head, error and bias adds to it directly.

The paper's analysis (Dunefsky, Chlenski, Nanda 2024, sections 4.1 and 4.2) on the frozen model of
one run, for any architecture. A target is a *feature vector* that stands in the residual stream at
one position; every component that writes there before it is read contributes the product of what
it wrote with the vector. The terms sum to the target, biases included. A feature's term is its
activation (which depends on the input) times its decoder row's product with the vector (which, but
for the norms' denominators, does not). A head's term, per source position, can be pulled back
through the head into a feature vector at that position, and a feature's into its encoder row.

Legend: D d_model, H heads, S source positions, n contributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.attachment.replacement import check_transcodes
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.remote.server import Remote, remote_server
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .active import ActiveFeatures, active_features
from .collect import Run, collect, position_in, token_ids_of, token_texts
from .engine import OperatorEngine
from .feature_vectors import Contribution, FeatureVector
from .freeze import frozen_attention
from .heads import Heads, LocalHeads
from .linear import FrozenModel
from .remote_heads import ServerHeads
from .remote_run import ServerWeights, collect_remote
from .targets import Target, choose_targets


class CircuitRun:
    """One prompt's frozen model, for taking targets apart.

    Args:
        sites: The model's sites.
        run: What ``collect`` kept.
        engine: The frozen model.
        active: The active features.
        model: The nnsight model, for its tokenizer, its unembedding and its attention modules.
        there: The weights of a model that is on a server; None of one that is here.
        heads: Its attention; default: that of the frozen model.
    """

    def __init__(
        self,
        sites: Sites,
        run: Run,
        engine: OperatorEngine,
        active: ActiveFeatures,
        model: Any,
        there: ServerWeights | None = None,
        heads: Heads | None = None,
    ) -> None:
        self.sites, self.run, self.active, self.there = sites, run, active, there
        self.frozen: FrozenModel = engine.frozen
        self._engine, self.model = engine, model
        self._resid = [resid.to(engine.dtype) for resid in run.resid]
        self._heads = LocalHeads(self.frozen, self._resid) if heads is None else heads

    @classmethod
    def collect(
        cls,
        model: Any,
        transcoders: TranscoderSet,
        prompt: str | Sequence[int] | Tensor,
        *,
        sites: Sites | None = None,
        remote: Remote | None = None,
        weights: str | Path | None = None,
    ) -> CircuitRun:
        """Run a prompt and freeze the model at it.

        Args:
            model: An nnsight model; for a remote one, its module tree is enough.
            transcoders: Its set.
            prompt: Text, or token ids ``(T,)``.
            sites: The model's sites, where they have to be given by hand.
            remote: Run the model on a server: True, an address, or a ``RemoteServer``.
            weights: Of a remote model: a folder or Hub repository with its checkpoint, to read its
                attention maps from. Without one they stay on the server, which then is asked for
                each target's contributions. ``"server"``: always.

        Raises:
            MismatchError: The set does not fit the model.
            InputError: A prompt that cannot be used.
            SiteError: The model cannot be written down as a linear operator.
        """
        server = remote_server(remote)
        module = hf_module(model, weights=server is None)
        sites = sites or resolve_sites(module)
        transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
        check_transcodes(transcoders)
        token_ids = token_ids_of(model, prompt, sites)
        there = None
        if server is None:
            run = collect(model, sites, token_ids, list(range(len(token_ids))))
        else:
            run, there = collect_remote(model, module, sites, token_ids, server, weights)
        maps = there is None or there.on_client
        engine = OperatorEngine(there or module, sites, run, transcoders, maps=maps)
        active = active_features(run, transcoders, engine.inputs, engine.dtype)
        heads = None
        if there is not None and not maps:
            heads = ServerHeads(there, engine.frozen, sites, run)
        return cls(sites, run, engine, active, model, there, heads)

    @property
    def remote(self) -> bool:
        """Whether the model is on a server."""
        return self.there is not None

    def with_maps(self) -> CircuitRun:
        """The same run with every layer's value and output maps here; those of a remote model are
        asked for (docs/remote_editing.md says how large they are)."""
        if isinstance(self._heads, LocalHeads):
            return self
        assert self.there is not None
        self.there.fetch_attention()
        layers = []
        for number, layer in enumerate(self.frozen.layers):
            norm = layer.attention_norm
            attention = frozen_attention(self.there, self.sites, number, self.run, norm)
            layers.append(replace(layer, attention=attention))
        found = copy(self)
        found.frozen = replace(self.frozen, layers=tuple(layers))
        found._heads = LocalHeads(found.frozen, self._resid)
        return found

    @property
    def token_texts(self) -> tuple[str, ...]:
        """The prompt's tokens as text."""
        return token_texts(self.model, self.run.token_ids)

    # -- targets ---------------------------------------------------------------------------------

    def feature(self, layer: int, index: int, position: int = -1) -> FeatureVector:
        """An active feature as the target: its pre-activation.

        Raises:
            InputError: It is not active there.
        """
        position = self._at(position)
        active = self.active.layers.get(layer)
        row = None
        if active is not None:
            row = ((active.position == position) & (active.index == index)).nonzero().flatten()
        if active is None or row is None or not len(row):
            raise InputError(
                f"feature {index} of layer {layer} is not active at position {position}"
            )
        return self._encoder_vector(layer, int(row[0]), 1.0)

    def token(self, target: Target, position: int = -1) -> FeatureVector:
        """A next token (or a named direction) as the target: its logit minus the mean logit."""
        position = self._at(position)
        run = self.run
        at = replace(
            run, logits=run.logits[[position]], probabilities=run.probabilities[[position]]
        )
        final = self._engine.final[position]
        module = None if self.there else hf_module(self.model)
        spec = choose_targets(self.model, module, self.sites, at, final, [target], 1, 1.0)
        if self.there and int(spec.index) >= 0:
            rows, bias = self.there.logit_directions(spec.index.tolist(), self.dtype)
            spec = replace(spec, direction=rows, bias=bias)
        norm = self.frozen.final_norm
        vector = norm.adjoint_at(spec.direction, torch.tensor([position]))[0]
        constant = float(spec.bias[0])
        if norm.bias is not None:
            constant += float(spec.direction[0] @ norm.bias)
        n_layers = self.frozen.n_layers
        return FeatureVector(
            vector, position, n_layers, n_layers, constant, spec.names[0], max(-1, int(spec.index))
        )

    def total(self, target: FeatureVector) -> float:
        """What a target's contributions sum to, read off the run itself."""
        stream = self._stream(target.n_attention, target.n_mlp)[target.position]
        return float(stream @ target.vector) + target.constant

    # -- values of the run -----------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """In which everything is computed."""
        return self._engine.dtype

    def inputs(self, layer: int) -> Tensor:
        """What a layer's transcoder read ``(T, D)``."""
        return self._engine.inputs[layer]

    def attention_output(self, layer: int) -> Tensor:
        """What a layer's attention added to the stream ``(T, D)``, but for its biases."""
        if isinstance(self._heads, LocalHeads):
            return self.frozen.layers[layer].attend(self._resid[layer], constants=False)
        attended, norm = self.run.attended[layer], self.frozen.layers[layer].attention_post_norm
        attended = attended.to(self.dtype)
        return (attended if norm is None else norm.forward(attended)) - self.attention_bias(layer)

    def attention_bias(self, layer: int) -> Tensor:
        """What the biases on the way through a layer's attention added to the stream."""
        return self._heads.bias(layer)

    # -- taking apart ----------------------------------------------------------------------------

    def contributions(self, target: FeatureVector) -> list[Contribution]:
        """Everything that contributes directly to a target; the values sum to ``total(target)``."""
        found = [*self._embeddings(target), *self._mlps(target), *self._attention(target)]
        if target.constant:
            found.append(Contribution("bias", -1, target.position, -1, target.constant))
        return found

    def prepare(self, targets: Sequence[FeatureVector]) -> None:
        """Several targets' contributions will be wanted: a server is asked for them together."""
        self._heads.prepare(targets)

    def extend(self, target: FeatureVector, by: Contribution) -> FeatureVector:
        """The feature vector that a contribution to a target pulls back to, in the same units.

        Raises:
            InputError: A component that paths end in.
        """
        return self.extend_all([(target, by)])[0]

    def extend_all(self, ends: Sequence[tuple[FeatureVector, Contribution]]) -> list[FeatureVector]:
        """``extend`` of several; a server is asked once for all of them.

        Raises:
            InputError: A component that paths end in.
        """
        through = [(target, by) for target, by in ends if by.kind == "attention"]
        vectors = iter(self._heads.pull_back(through))
        return [
            FeatureVector(next(vectors), by.position, by.layer, by.layer, 0.0, str(by))
            if by.kind == "attention"
            else self._extended(target, by)
            for target, by in ends
        ]

    def _extended(self, target: FeatureVector, by: Contribution) -> FeatureVector:
        if by.kind == "feature":
            active = self.active.layers[by.layer]
            here = (active.position == by.position) & (active.index == by.index)
            return self._encoder_vector(by.layer, int(here.nonzero()), by.weight)
        if by.kind == "skip":
            vector = self.frozen.layers[by.layer].skipped_at(target.vector, target.position)
            above = by.layer if self.frozen.parallel else by.layer + 1
            return FeatureVector(vector, target.position, above, by.layer, 0.0, str(by))
        raise InputError(f"a path ends at a {by.kind}: it cannot be extended")

    def _encoder_vector(self, layer: int, row: int, weight: float) -> FeatureVector:
        """A feature's encoder row in the stream, times a weight; ``row`` is one of its layer's."""
        active, read = self.active.layers[layer], self.frozen.layers[layer].read
        vector, position = active.encoder_of(torch.tensor([row]))[0], int(active.position[row])
        constant = float(active.encoder_bias[row])
        if read is not None:
            if read.bias is not None:
                constant += float(vector @ read.bias)
            vector = read.adjoint_at(vector[None], active.position[[row]])[0]
        above = layer if self.frozen.parallel else layer + 1
        name = f"feature {layer} {int(active.index[row])} @{position}"
        return FeatureVector(vector * weight, position, above, layer, constant * weight, name)

    def _embeddings(self, target: FeatureVector) -> list[Contribution]:
        at, vector = target.position, target.vector
        embedding = self.run.embedding[at].to(vector.dtype)
        found = [Contribution("token", -1, at, -1, float(embedding @ vector))]
        if self.run.position_embedding is not None:
            embedding = self.run.position_embedding[at].to(vector.dtype)
            found.append(Contribution("position", -1, at, -1, float(embedding @ vector)))
        return found

    def _mlps(self, target: FeatureVector) -> list[Contribution]:
        found, at = [], target.position
        for source, active in self.active.layers.items():
            rows = (active.position == at).nonzero().flatten()
            weights = torch.zeros(len(rows), dtype=target.vector.dtype)
            decoder = active.decoder_of(rows)
            for j, layer in enumerate(active.targets):
                if layer < target.n_mlp:
                    weights += self._written(layer, decoder[:, j], at) @ target.vector
            if source < target.n_mlp:
                for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
                    activation, index = float(active.activation[row]), int(active.index[row])
                    value = activation * weight
                    found.append(
                        Contribution("feature", source, at, index, value, activation, weight)
                    )
        for layer in range(target.n_mlp):
            error = self._written(layer, self.active.error[layer][[at]], at)[0]
            found.append(Contribution("error", layer, at, -1, float(error @ target.vector)))
            found += self._mlp_constants(layer, target)
        return found

    def _mlp_constants(self, layer: int, target: FeatureVector) -> list[Contribution]:
        """The skip path, and what the decoder's and the norms' biases add."""
        block, at, found, bias = self.frozen.layers[layer], target.position, [], 0.0
        decoder_bias = self.active.bias[layer]
        if decoder_bias is not None:
            bias += float(self._written(layer, decoder_bias[None], at)[0] @ target.vector)
        if block.write is not None and block.write.bias is not None:
            bias += float(block.write.bias @ target.vector)
        if block.skip is not None:
            vector = block.skipped_at(target.vector, at)
            above = layer if self.frozen.parallel else layer + 1
            value = float(self._stream(above, layer)[at] @ vector)
            found.append(Contribution("skip", layer, at, -1, value))
            if block.read is not None and block.read.bias is not None:
                constant = (block.skip @ block.read.bias)[None]
                bias += float(self._written(layer, constant, at)[0] @ target.vector)
        if bias:
            found.append(Contribution("bias", layer, at, -1, bias))
        return found

    def _attention(self, target: FeatureVector) -> list[Contribution]:
        found, at = [], target.position
        for layer, (terms, bias) in enumerate(self._heads.terms(target)):
            heads, sources = terms.nonzero(as_tuple=True)
            for head, source, value in zip(
                heads.tolist(), sources.tolist(), terms[heads, sources].tolist(), strict=True
            ):
                found.append(Contribution("attention", layer, source, head, value))
            if bias:
                found.append(Contribution("bias", layer, at, -1, bias))
        return found

    def _written(self, layer: int, vectors: Tensor, position: int) -> Tensor:
        positions = torch.full((len(vectors),), position)
        return self.frozen.to_stream(layer, vectors, positions)

    def _stream(self, n_attention: int, n_mlp: int) -> Tensor:
        """The residual stream ``(T, D)`` after so many layers' attention and MLP outputs."""
        if n_mlp == self.frozen.n_layers:
            return self.run.final.to(self._engine.dtype)
        stream = self._resid[n_mlp]
        return self.run.mid[n_mlp].to(stream.dtype) if n_attention > n_mlp else stream

    def _at(self, position: int) -> int:
        return position_in(position, self.run.n_positions)

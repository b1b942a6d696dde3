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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nnsight_transcoders.attachment.replacement import check_transcodes
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.remote.server import Remote, remote_server
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .active import ActiveFeatures, active_features
from .collect import Run, collect, token_ids_of, token_texts
from .engine import OperatorEngine
from .linear import FrozenModel
from .remote_run import ServerWeights, collect_remote
from .targets import Target, choose_targets

Kind = Literal["token", "position", "feature", "error", "attention", "skip", "bias"]

#: What a path can be continued from; the others are where paths end.
EXTENDABLE = ("feature", "attention", "skip")


@dataclass(frozen=True)
class FeatureVector:
    """A target in the residual stream (the paper's term).

    Attributes:
        vector: ``(D,)`` its product with the stream is what is taken apart.
        position: Where it stands.
        n_attention: How many layers' attention has been added where it reads.
        n_mlp: How many layers' MLP outputs have been added where it reads.
        constant: What is added to the product: an encoder's bias times the weights so far.
        name: For messages and graphs.
        token_id: The vocabulary id where a token's logit is the root target; -1 otherwise.
    """

    vector: Tensor
    position: int
    n_attention: int
    n_mlp: int
    constant: float
    name: str
    token_id: int = -1


@dataclass(frozen=True)
class Contribution:
    """What one component adds to a target.

    Attributes:
        kind: ``"token"``, ``"position"`` (a separate position embedding), ``"feature"``,
            ``"error"``, ``"attention"``, ``"skip"`` (a transcoder's affine path) or ``"bias"``.
        layer: The component's layer; -1 for embeddings, and for the target's own constant.
        position: The position it is read at: the source position of an attention term.
        index: Feature number, or head; -1 otherwise.
        value: The contribution, in units of the root target.
        activation: For a feature: its activation, the factor that depends on the input.
        weight: For a feature: the other factor, ``value = activation * weight``.
    """

    kind: Kind
    layer: int
    position: int
    index: int
    value: float
    activation: float = 1.0
    weight: float = 0.0

    def __str__(self) -> str:
        layer = f" {self.layer}" if self.layer >= 0 else ""
        index = {"feature": f" {self.index}", "attention": f" head {self.index}"}
        return f"{self.kind}{layer}{index.get(self.kind, '')} @{self.position}"


class CircuitRun:
    """One prompt's frozen model, for taking targets apart.

    Args:
        sites: The model's sites.
        run: What ``collect`` kept.
        engine: The frozen model.
        active: The active features.
        model: The nnsight model, for its tokenizer, its unembedding and its attention modules.
        there: The weights of a model that is on a server; None of one that is here.
    """

    def __init__(
        self,
        sites: Sites,
        run: Run,
        engine: OperatorEngine,
        active: ActiveFeatures,
        model: Any,
        there: ServerWeights | None = None,
    ) -> None:
        self.sites, self.run, self.active, self._there = sites, run, active, there
        self.frozen: FrozenModel = engine.frozen
        self._engine, self.model = engine, model
        self._resid = [resid.to(engine.dtype) for resid in run.resid]
        start = torch.zeros_like(engine.final)
        self._attention_bias = [layer.attend(start, constants=True) for layer in self.frozen.layers]

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
                attention maps from. Without one they come from the server. ``"server"``: always.

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
        engine = OperatorEngine(there or module, sites, run, transcoders)
        active = active_features(run, transcoders, engine.inputs, engine.dtype)
        return cls(sites, run, engine, active, model, there)

    @property
    def remote(self) -> bool:
        """Whether the model is on a server."""
        return self._there is not None

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
        module = None if self._there else hf_module(self.model)
        spec = choose_targets(self.model, module, self.sites, at, final, [target], 1, 1.0)
        if self._there and int(spec.index) >= 0:
            rows, bias = self._there.logit_directions(spec.index.tolist(), self.dtype)
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
        return self.frozen.layers[layer].attend(self._resid[layer], constants=False)

    def attention_bias(self, layer: int) -> Tensor:
        """What the biases on the way through a layer's attention added to the stream."""
        return self._attention_bias[layer]

    # -- taking apart ----------------------------------------------------------------------------

    def contributions(self, target: FeatureVector) -> list[Contribution]:
        """Everything that contributes directly to a target; the values sum to ``total(target)``."""
        found = [*self._embeddings(target), *self._mlps(target), *self._attention(target)]
        if target.constant:
            found.append(Contribution("bias", -1, target.position, -1, target.constant))
        return found

    def extend(self, target: FeatureVector, by: Contribution) -> FeatureVector:
        """The feature vector that a contribution to a target pulls back to, in the same units.

        Raises:
            InputError: A component that paths end in.
        """
        if by.kind == "feature":
            active = self.active.layers[by.layer]
            here = (active.position == by.position) & (active.index == by.index)
            return self._encoder_vector(by.layer, int(here.nonzero()), by.weight)
        if by.kind == "attention":
            folded = self.frozen.folded[by.layer]
            vector = folded.pull_back(target.vector, target.position, by.index, by.position)
            return FeatureVector(vector, by.position, by.layer, by.layer, 0.0, str(by))
        if by.kind == "skip":
            vector = self.frozen.folded[by.layer].skipped_at(target.vector, target.position)
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
            vector = self.frozen.folded[layer].skipped_at(target.vector, at)
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
        for layer in range(target.n_attention):
            folded = self.frozen.folded[layer]
            terms = folded.head_terms(target.vector, at, self._resid[layer])
            heads, sources = terms.nonzero(as_tuple=True)
            for head, source, value in zip(
                heads.tolist(), sources.tolist(), terms[heads, sources].tolist(), strict=True
            ):
                found.append(Contribution("attention", layer, source, head, value))
            bias = float(self._attention_bias[layer][at] @ target.vector)
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
        length = self.run.n_positions
        if not -length <= position < length:
            raise InputError(f"position {position} is outside the prompt of {length} tokens")
        return position % length

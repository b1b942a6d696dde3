"""Heads of a run whose value and output maps stay on a server.

Llama-3.1-70B's maps are 12 GB. What paths need of them is a number for each head and source
position of a target, and for the few heads that are followed a vector each: computed there, for all
targets of a round in one request.

Legend: T positions, D d_model, H heads, S source positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.norms import TOLERANCE
from nnsight_transcoders.remote.problem import packed_norm
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import dtype_name

from .collect import Run
from .feature_vectors import Contribution, FeatureVector
from .freeze import not_explained
from .heads_job import attention_constants, head_terms, through_maps
from .linear import FrozenModel
from .remote_run import ServerWeights

Terms = list[tuple[Tensor, float]]


class ServerHeads:
    """``heads.Heads`` that asks a server.

    Args:
        there: The model's weights there.
        frozen: The frozen model; its norms and patterns are used.
        sites: The model's sites.
        run: The run.
    """

    def __init__(self, there: ServerWeights, frozen: FrozenModel, sites: Sites, run: Run) -> None:
        self._there, self._frozen, self._sites, self._run = there, frozen, sites, run
        layers = []
        for layer, block in zip(sites.layers, frozen.layers, strict=True):
            before, after = block.attention_norm, block.attention_post_norm
            norms = {
                "attention_norm": None if before is None else packed_norm(before),
                "attention_post_norm": None if after is None else packed_norm(after),
            }
            layers.append({**asdict(layer), **norms})
        self._spec: dict[str, Any] = {
            "layers": layers,
            "heads": (sites.n_value_heads, sites.head_dim),
            "out_width": sites.n_heads * sites.head_dim,
            "dtype": dtype_name(frozen.dtype),
        }
        # A target is kept with its terms, so that no other one gets its id.
        self._terms: dict[int, tuple[FeatureVector, Terms]] = {}
        self._bias: list[Tensor] = []

    def prepare(self, targets: Sequence[FeatureVector]) -> None:
        """See ``Heads``: one request for those whose terms are not known."""
        wanted = [t for t in targets if t.n_attention and id(t) not in self._terms]
        self._terms.update({id(t): (t, []) for t in targets if not t.n_attention})
        if not wanted:
            return
        limits = torch.tensor([target.n_attention for target in wanted])
        found = self._there.ask(
            head_terms,
            self._cut(int(limits.max())),
            torch.stack([target.vector for target in wanted]).cpu(),
            torch.tensor([target.position for target in wanted]),
            limits,
        )
        rows: list[Terms] = [[] for _ in wanted]
        for number, answer in enumerate(found):
            if not answer["difference"] <= TOLERANCE[self._run.final.dtype]:
                raise not_explained(self._sites.layers[number], answer["difference"])
            reading = (limits > number).nonzero().flatten().tolist()
            for i, terms, bias in zip(reading, answer["terms"], answer["bias"], strict=True):
                rows[i].append((terms[:, : wanted[i].position + 1], float(bias)))
        for target, terms in zip(wanted, rows, strict=True):
            self._terms[id(target)] = (target, terms)

    def terms(self, target: FeatureVector) -> Terms:
        """See ``Heads``."""
        self.prepare([target])
        return self._terms[id(target)][1]

    def pull_back(self, ends: Sequence[tuple[FeatureVector, Contribution]]) -> list[Tensor]:
        """See ``Heads``: one request for all of them."""
        by_layer: dict[int, list[int]] = defaultdict(list)
        for i, (_, by) in enumerate(ends):
            by_layer[by.layer].append(i)
        if not by_layer:
            return []
        asked = [
            (
                layer,
                torch.stack([ends[i][0].vector for i in chosen]).cpu(),
                torch.tensor([ends[i][0].position for i in chosen]),
                torch.tensor([ends[i][1].index for i in chosen]),
            )
            for layer, chosen in sorted(by_layer.items())
        ]
        answers = self._there.ask(through_maps, self._cut(max(by_layer) + 1), asked)
        vectors: dict[int, Tensor] = {}
        for (layer, *_), answer in zip(asked, answers, strict=True):
            for i, vector in zip(by_layer[layer], answer, strict=True):
                vectors[i] = self._at_source(vector, *ends[i])
        return [vectors[i] for i in range(len(ends))]

    def _at_source(self, vector: Tensor, target: FeatureVector, by: Contribution) -> Tensor:
        """A vector at what the values are made of, as it reads the stream at the source."""
        block = self._frozen.layers[by.layer]
        vector = vector * block.attention.pattern[by.index, target.position, by.position]
        norm = block.attention_norm
        if norm is None:
            return vector
        return norm.adjoint_at(vector[None], torch.tensor([by.position]))[0]

    def bias(self, layer: int) -> Tensor:
        """See ``Heads``: asked for once, for this layer and those below, if there are any."""
        if not any(self._has_bias(number) for number in range(layer + 1)):
            return torch.zeros_like(self._run.final, dtype=self._frozen.dtype)
        if layer >= len(self._bias):
            n_layers = layer + 1
            self._bias = self._there.ask(attention_constants, self._cut(n_layers), n_layers)
        return self._bias[layer]

    def _has_bias(self, layer: int) -> bool:
        here, block = self._sites.layers[layer], self._frozen.layers[layer]
        norms = (block.attention_norm, block.attention_post_norm)
        return self._there.has_bias(here.value, here.out_proj) or any(
            norm is not None and norm.bias is not None for norm in norms
        )

    def _cut(self, n_layers: int) -> dict[str, Any]:
        return {**self._spec, "layers": self._spec["layers"][:n_layers]}

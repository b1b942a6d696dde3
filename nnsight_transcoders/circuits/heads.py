"""What each attention head of a run adds to a target, and where it got that from.

Of a model that is here, from its value and output maps; ``remote_heads.py`` asks a server.

Legend: T positions, D d_model, H heads, S source positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .feature_vectors import Contribution, FeatureVector
from .linear import FrozenModel


class Heads(Protocol):
    """The attention of a run."""

    def prepare(self, targets: Sequence[FeatureVector]) -> None:
        """Several targets' ``terms`` will be wanted: ask for them together."""
        ...

    def terms(self, target: FeatureVector) -> list[tuple[Tensor, float]]:
        """Per layer that the target reads: what each head moves into it from each source position
        ``(H, S)``, and what the biases on the way through attention add."""
        ...

    def pull_back(self, ends: Sequence[tuple[FeatureVector, Contribution]]) -> list[Tensor]:
        """The vectors ``(D,)`` that some heads' contributions pull back to, at their sources."""
        ...

    def bias(self, layer: int) -> Tensor:
        """What the biases on the way through a layer's attention add to the stream ``(T, D)``."""
        ...


class LocalHeads:
    """``Heads`` of a frozen model whose maps are here.

    Args:
        frozen: The frozen model.
        resid: Per layer, the block's input ``(T, D)``.
    """

    def __init__(self, frozen: FrozenModel, resid: Sequence[Tensor]) -> None:
        self._frozen, self._resid = frozen, resid
        start = torch.zeros_like(resid[0])
        self._bias = [layer.attend(start, constants=True) for layer in frozen.layers]

    def prepare(self, targets: Sequence[FeatureVector]) -> None:
        """Nothing has to be asked for."""

    def terms(self, target: FeatureVector) -> list[tuple[Tensor, float]]:
        """See ``Heads``."""
        found = []
        for layer in range(target.n_attention):
            folded, resid = self._frozen.folded[layer], self._resid[layer]
            bias = float(self._bias[layer][target.position] @ target.vector)
            found.append((folded.head_terms(target.vector, target.position, resid), bias))
        return found

    def pull_back(self, ends: Sequence[tuple[FeatureVector, Contribution]]) -> list[Tensor]:
        """See ``Heads``."""
        return [
            self._frozen.folded[by.layer].pull_back(
                target.vector, target.position, by.index, by.position
            )
            for target, by in ends
        ]

    def bias(self, layer: int) -> Tensor:
        """See ``Heads``."""
        return self._bias[layer]

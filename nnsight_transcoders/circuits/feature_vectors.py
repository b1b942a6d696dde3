"""A target in the residual stream, and what one component adds to it.

Legend: D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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

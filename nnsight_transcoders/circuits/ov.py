"""OV circuits: what attention heads do to a vector of the stream (torch only: it also runs in
remote jobs).

Legend: n vectors, D d_model, m = heads x width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .linear import FrozenAttention, FrozenNorm


@dataclass(frozen=True)
class OVCircuit:
    """What some heads of one layer do to a vector of the stream, per unit of attention.

    Attributes:
        layer: Their layer.
        value: ``(m, D)`` value rows, the norm before attention folded in; under grouped-query
            attention a head has those of its group.
        out: ``(D, m)`` output columns, the norm behind attention folded in.
    """

    layer: int
    value: Tensor
    out: Tensor

    def forward(self, written: Tensor) -> Tensor:
        """``W_V W_O`` of vectors ``(n, D)`` before attention: what the heads move to later ones."""
        return (written @ self.value.T) @ self.out.T

    def pull_back(self, read: Tensor) -> Tensor:
        """The transpose: cotangents ``(n, D)`` after attention to those before it."""
        return (read @ self.out) @ self.value


def head_circuit(
    layer: int,
    attention: FrozenAttention,
    norm: FrozenNorm | None,
    post_norm: FrozenNorm | None,
    heads: Sequence[int],
    n_heads: int,
) -> OVCircuit:
    """The OV circuit of some heads.

    Args:
        layer: Their layer.
        attention: Its weights.
        norm: The norm before attention, without what depends on the input.
        post_norm: The norm behind it, the same.
        heads: Which.
        n_heads: How many the layer has.
    """
    value, out, width = attention.W_V, attention.W_O, attention.head_dim
    if norm is not None:
        value = norm.fold_in(value)
    if post_norm is not None:
        out = post_norm.fold_out(out.T).T
    group = n_heads // (len(value) // width)
    value = value.unflatten(0, (-1, width))[[h // group for h in heads]].flatten(0, 1)
    out = out.unflatten(1, (-1, width))[:, list(heads)].flatten(1)
    return OVCircuit(layer, value, out)

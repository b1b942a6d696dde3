"""The two products of a TopK step through its active features only (torch only).

With k of F features active, the decoder and every gradient need a share k / F of the dense work;
what stays dense is the encoder's forward product, which says who the k are. All sums are
``embedding_bag``s: over a position's features for values, over a feature's positions for the
gradients of weights, which is many times faster on a CPU than adding rows into place.

Legend: B positions, F features, n active (position, feature) pairs, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pre-activations ``(B, F)`` -> values ``(n,)``, columns ``(n,)``, offsets ``(B,)``.
Choose = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Active:
    """Sparse activations.

    Attributes:
        values: ``(n,)`` ordered by position.
        columns: ``(n,)`` each one's feature.
        offsets: ``(B,)`` where each position's values begin.
        width: F.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor
    width: int

    @property
    def rows(self) -> Tensor:
        """``(n,)`` each value's position."""
        return _rows(self.offsets, len(self.columns))

    def dense(self) -> Tensor:
        """``(B, F)``."""
        out = self.values.new_zeros(len(self.offsets), self.width)
        return out.index_put((self.rows, self.columns), self.values)


def _rows(offsets: Tensor, n: int) -> Tensor:
    counts = torch.diff(offsets, append=offsets.new_tensor([n]))
    return torch.repeat_interleave(counts)


def _bag(columns: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(columns, table, offsets, mode="sum", per_sample_weights=weights)


def _by_feature(
    columns: Tensor, offsets: Tensor, weights: Tensor, table: Tensor, width: int
) -> Tensor:
    """``(F, d)``: per feature, the weighted sum of the rows of ``table (B, d)`` it is active at."""
    order = columns.argsort(stable=True)
    counts = torch.bincount(columns, minlength=width)
    rows = _rows(offsets, len(columns))[order]
    return _bag(rows, table, counts.cumsum(0) - counts, weights[order])


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, columns, offsets = choose(F.linear(x, weight, bias))
        values = values.to(weight.dtype)  # autocast makes them coarser
        ctx.save_for_backward(x, weight, values, columns, offsets)
        ctx.mark_non_differentiable(columns, offsets)
        return values, columns, offsets

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, values, columns, offsets = ctx.saved_tensors
        grad = torch.where(values > 0, grad, 0.0)  # a ReLU comes first
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _bag(columns, weight, offsets, grad)
        if ctx.needs_input_grad[1]:
            for_weight = _by_feature(columns, offsets, grad, x.to(weight.dtype), len(weight))
        if ctx.needs_input_grad[2]:
            for_bias = grad.new_zeros(len(weight)).index_add(0, columns, grad)
        return for_x, for_weight, for_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, columns: Tensor, offsets: Tensor, table: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, columns, offsets, table)
        return _bag(columns, table, offsets, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, columns, offsets, table = ctx.saved_tensors
        for_values = for_table = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            # The product of each value's row with its position's gradient: embedding_bag's own
            # gradient for its weights, which does not write the rows out.
            with torch.enable_grad():
                weights = torch.ones_like(values).requires_grad_()
                out = _bag(columns, table.detach(), offsets, weights)
            (for_values,) = torch.autograd.grad(out, weights, grad)
        if ctx.needs_input_grad[3]:
            for_table = _by_feature(columns, offsets, values, grad, len(table))
        return for_values, None, None, for_table


def sparse_encode(x: Tensor, weight: Tensor, bias: Tensor, choose: Choose) -> Active:
    """The features that ``choose`` finds among ``relu(x weight.T + bias)``.

    Args:
        x: ``(B, d)``.
        weight: ``(F, d)``.
        bias: ``(F,)``.
        choose: See ``Choose``; what it picks below zero counts as zero.

    Returns:
        Their activations; gradients flow to ``x``, ``weight`` and ``bias`` as those of the dense
        TopK do.
    """
    values, columns, offsets = _Encode.apply(x, weight, bias, choose)  # type: ignore[misc]
    return Active(values, columns, offsets, len(weight))


def sparse_sum(active: Active, table: Tensor) -> Tensor:
    """``active @ table``: ``(B, d)`` for a contiguous table ``(F, d)``."""
    out = _Decode.apply(active.values, active.columns, active.offsets, table)
    assert isinstance(out, Tensor)
    return out


# -- who is active -------------------------------------------------------------------------------


def choose_topk(k: int, n_groups: int = 1) -> Choose:
    """The ``k`` largest of each position, inside each of ``n_groups`` groups of features."""

    def choose(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = pre.unflatten(-1, (n_groups, -1))
        values, columns = grouped.topk(k, dim=-1, sorted=False)
        columns += torch.arange(n_groups, device=pre.device)[:, None] * grouped.shape[-1]
        kept = k * n_groups
        offsets = torch.arange(0, kept * len(pre), kept, device=pre.device)
        return values.flatten().relu(), columns.flatten(), offsets

    return choose


def choose_batch_topk(k: int) -> Choose:
    """The ``k * B`` largest of the whole batch (Bussmann et al. 2024)."""

    def choose(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = pre.shape[-1]
        values, places = _largest(pre.flatten(), k * len(pre))
        values, places = values[values > 0], places[values > 0]
        places, order = places.sort()
        counts = torch.bincount(places // width, minlength=len(pre))
        return values[order], places % width, counts.cumsum(0) - counts

    return choose


def _largest(flat: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` largest and their places, like ``topk``, which is slow on very long tensors.

    A bound from a sample leaves about twice as many candidates; where it was too high, all are.
    """
    sample = flat[::_STRIDE]
    if n >= 2 * _STRIDE and n < len(flat) // 4:
        bound = sample.topk(2 * n // _STRIDE, sorted=False).values.min()
        places = (flat > bound).nonzero().flatten()
        if len(places) >= n:
            values, order = flat[places].topk(n, sorted=False)
            return values, places[order]
    return flat.topk(n, sorted=False)


#: Odd, so that the sample has values of all features.
_STRIDE = 17

"""The decoder's product through nonzero activations only (torch only).

Of a transcoder's features some tens out of tens of thousands are active at a position, so most of
the dense product multiplies zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Below this share of active features the sparse product is the faster one.
SPARSE_BELOW = 0.02


class _SparseDecode(torch.autograd.Function):
    """The product through nonzero activations; its gradients are those of the dense product.

    ``embedding_bag`` alone would give no gradient to a feature that is zero, so what a trace reads
    as a feature's gradient would depend on which decoder was chosen.
    """

    @staticmethod
    def forward(ctx: Any, acts: Tensor, table: Tensor, stride: int, offset: int) -> Tensor:
        rows, columns = acts.nonzero(as_tuple=True)
        ctx.save_for_backward(acts, table)
        ctx.stride, ctx.offset = stride, offset
        counts = torch.bincount(rows, minlength=acts.shape[0])
        return F.embedding_bag(
            columns * stride + offset,
            table,
            offsets=counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=acts[rows, columns],
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        acts, table = ctx.saved_tensors
        for_acts = for_table = None
        if ctx.needs_input_grad[0]:
            for_acts = grad @ table[ctx.offset :: ctx.stride].T
        if ctx.needs_input_grad[1]:
            rows, columns = acts.nonzero(as_tuple=True)
            written = acts[rows, columns, None] * grad[rows]
            index = columns * ctx.stride + ctx.offset
            for_table = torch.zeros_like(table).index_add(0, index, written)
        return for_acts, for_table, None, None


def sparse_decode(activations: Tensor, table: Tensor, stride: int = 1, offset: int = 0) -> Tensor:
    """``activations @ table`` through the nonzero activations only.

    Args:
        activations: ``(..., F)``.
        table: ``(F * stride, d_out)``, contiguous; feature ``i`` has row ``i * stride + offset``.

    Returns:
        ``(..., d_out)``; it and its gradients are those of the dense product up to the order of
        summation.
    """
    flat = activations.reshape(-1, activations.shape[-1])
    out = _SparseDecode.apply(flat, table, stride, offset)
    return out.reshape(*activations.shape[:-1], table.shape[-1])


def use_sparse(activations: Tensor, sparse: bool | None) -> bool:
    """Whether to take the sparse product: as asked for, else by the share of active features."""
    if sparse is not None:
        return sparse
    return activations.count_nonzero().item() < SPARSE_BELOW * activations.numel()

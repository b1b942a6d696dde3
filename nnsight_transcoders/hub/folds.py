"""Exact rewritings that bring foreign weights into the canonical form."""

from __future__ import annotations

import torch
from torch import Tensor

#: What ``provenance["folds"]`` says of ``centred_bias``.
INPUT_CENTRING = "input centring: b_enc <- b_enc - W_enc @ b_dec, once, in float64"


def centred_bias(W_enc: Tensor, b_enc: Tensor, centre: Tensor) -> Tensor:
    """The encoder bias that makes up for a centre subtracted from the input.

    ``W_enc (x - c) + b = W_enc x + (b - W_enc c)``. The product is summed in float64, a piece of
    the rows at a time, and rounded once to the bias's own dtype.

    Args:
        W_enc: ``(F, d_in)``, in any memory layout.
        b_enc: ``(F,)``.
        centre: ``(d_in,)``.
    """
    wide = centre.to(torch.float64)
    shift = torch.cat([rows.to(torch.float64) @ wide for rows in W_enc.split(4096)])
    return (b_enc.to(torch.float64) - shift).to(b_enc.dtype)


def fold_input_centring(tensors: dict[str, Tensor]) -> None:
    """``LayerPlan.fold`` of a layer that subtracts ``b_dec`` from its input as well."""
    tensors["b_enc"] = centred_bias(tensors["W_enc"], tensors["b_enc"], tensors["b_dec"])

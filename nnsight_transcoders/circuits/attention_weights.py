"""The value and output maps of an attention, from its modules, and whether they explain a run.

Torch only: it also runs inside a remote job, where a module may be there without its weights and
can only be asked for its values (``remote/edge_job.py``).

Legend: T positions, D d_model, H query heads, K value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import FrozenAttention

#: A linear map's weight ``(out, in)`` and bias ``(out,)`` or None.
Linear = tuple[Tensor, Tensor | None]
#: A map is asked for its values at this multiple of a basis: the bias is then small beside the
#: weights, which in half precision come back as they are and not rounded to the bias's grid.
BASIS_SCALE = 256.0
#: Rows of a basis that go through a map at a time.
BASIS_ROWS = 1024


def stored_weight(linear: Any, dtype: torch.dtype) -> Linear | None:
    """The weight and bias of an ``nn.Linear`` or transformers' ``Conv1D``; None of anything else
    (quantised layers) and of a module without weights (meta device)."""
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta:
        return None
    if not weight.is_floating_point():
        return None
    weight = weight.detach().to(dtype)
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    return weight, None if bias is None else bias.detach().to(dtype)


def probed_weight(
    call: Callable[[Tensor], Tensor],
    width: int,
    like: Tensor,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Linear:
    """A linear map's weight and bias from its values on a basis, of which a part goes through at a
    time.

    Args:
        call: The map, of ``(n, width)``.
        width: Of its input.
        like: A tensor of the dtype and on the device that it takes.
        dtype: Of the result.
        rows: Which rows of the weight are wanted; default: all.
    """
    at: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    wide = torch.promote_types(like.dtype, torch.float32)

    def wanted(x: Tensor) -> Tensor:
        out = call(x).detach()
        return (out if rows is None else out[:, rows]).to(wide)

    bias = wanted(torch.zeros(1, width, **at))[0]
    weight = torch.empty(len(bias), width, device=bias.device, dtype=dtype)
    for start in range(0, width, BASIS_ROWS):
        part = torch.zeros(min(BASIS_ROWS, width - start), width, **at)
        part.diagonal(start).fill_(BASIS_SCALE)
        weight[:, start : start + BASIS_ROWS] = ((wanted(part) - bias) / BASIS_SCALE).T
    return weight, bias.to(dtype) if bool(bias.any()) else None


def split_value(
    value: Linear, n_value_heads: int, head_dim: int, layout: str
) -> tuple[Tensor, Tensor | None]:
    """The value rows of a possibly fused projection: ``(K * E, D)`` and ``(K * E,)``."""
    if layout == "separate":
        return value

    def rows(tensor: Tensor) -> Tensor:
        if layout == "concatenated":
            return tensor[-n_value_heads * head_dim :]
        blocks = tensor.unflatten(0, (n_value_heads, -1, head_dim))
        return blocks[:, -1].flatten(0, 1)

    weight, bias = value
    return rows(weight), None if bias is None else rows(bias)


def other_layouts(layout: str) -> list[str]:
    """A layout, and the other way of fusing that has the same shapes."""
    if layout == "separate":
        return [layout]
    return [layout, "grouped" if layout == "concatenated" else "concatenated"]


def fit_attention(
    pattern: Tensor,
    value: Linear,
    out: Linear,
    heads: tuple[int, int],
    layouts: Sequence[str],
    x: Tensor,
    attended: Tensor,
) -> tuple[FrozenAttention, float]:
    """The attention at a run's pattern, with the layout of its values that explains the run best.

    Args:
        pattern: ``(H, T, T)``.
        value: The module that makes the values, perhaps fused with queries and keys.
        out: The output projection.
        heads: K and E.
        layouts: From ``other_layouts``.
        x: ``(T, D)`` what the value module read.
        attended: ``(T, D)`` what the output projection gave.

    Returns:
        The attention, and the relative difference of what it gives from ``attended``.
    """
    best: tuple[FrozenAttention, float] | None = None
    for layout in layouts:
        attention = FrozenAttention(pattern, *split_value(value, *heads, layout), *out)
        difference = attention.forward(x) - attended
        relative = float(difference.norm() / attended.norm().clamp_min(1e-30))
        if best is None or relative < best[1]:
            best = attention, relative
    assert best is not None
    return best

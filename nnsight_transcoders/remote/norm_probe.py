"""What a norm computes, found by calling it: its weights need not be at hand (torch only).

A sandboxed job has the model's modules without their weights; calling one runs it where the
weights are. Four rows tell all there is to a LayerNorm or RMSNorm: a row of ones with alternating
signs (mean 0, mean square 1) and its negative give gain and bias, and a shifted and scaled row
tells whether the mean is subtracted. ``norms.norm_spec`` compares with the stored weights instead,
where they are at hand.

Legend: D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def probe_norm(model: Any, norm: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """A norm's gain, bias, epsilon and whether it is centred, as plain data.

    Args:
        model: The model, running.
        norm: ``path``, ``width`` and candidates for its epsilon, ``eps``.
        like: A value of the model, for dtype and device.

    Returns:
        ``gain (D,)``, ``bias (D,)`` or None, ``eps``, ``centred``, and ``difference``, how far
        (relatively) such a norm is from what the module gives on values of every size.
    """
    width = norm["width"]
    row = _balanced(width, like)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, width, generator=generator).to(like)
    small = torch.cat([noise[:1] * 1e-2 + 1e-2, noise[1:] * 3 + 1])
    probes = torch.cat([row[None], -row[None], small])
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = model.get(norm["path"])(probes[None])[0].to(wide)
    bias = (out[0] + out[1]) / 2
    slope = (out[0] - out[1]) / (2 * row.to(wide))
    best: dict[str, Any] = {"difference": float("inf")}
    for centred in (False, True):
        for eps in norm["eps"]:
            gain = slope * (1 + eps) ** 0.5
            found = _apply(small.to(wide), gain, bias, eps, centred)
            difference = float((found - out[2:]).norm() / out[2:].norm().clamp_min(1e-30))
            if difference < best["difference"]:
                best = {"gain": gain, "eps": eps, "centred": centred, "difference": difference}
    # Without a bias the two rows cancel exactly, in any dtype.
    best["bias"] = bias if bool(bias.any()) else None
    return best


def _balanced(width: int, like: Tensor) -> Tensor:
    """``(D,)`` with mean 0 and mean square 1, no entry near 0."""
    row = torch.ones(width, dtype=like.dtype, device=like.device)
    row[1::2] = -1
    if width % 2:
        row[-3:] = torch.tensor([2**0.5, -(2**-0.5), -(2**-0.5)]).to(like)
    return row


def _apply(x: Tensor, gain: Tensor, bias: Tensor, eps: float, centred: bool) -> Tensor:
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain + bias

"""What is minimised: pure functions of tensors (torch only).

    fvu   sum |y - y_hat|^2 / sum |y - mean y|^2              over the batch
    mse   mean (y - y_hat)^2                                  over the batch and d_model
    l1    mean over positions of  sum_i a_i w_i
    tanh  mean over positions of  sum_i tanh(c a_i w_i)
    l0    mean over positions of  sum_i 1[z_i > theta_i]      with the gradient below

``w_i`` is the norm of all that feature i writes. JumpReLU's gradients are those of Rajamanoharan et
al. 2024 ("Jumping Ahead", eqs. 11 and 12), with the kernel K(u) = 1[|u| < 1/2] of width eps:

    d/dtheta  z 1[z > theta]  = -(theta / eps) K((z - theta) / eps)
    d/dtheta  1[z > theta]    = -(1 / eps)     K((z - theta) / eps)
    d/dz      z 1[z > theta]  =  1[z > theta],   d/dz 1[z > theta] = 0

The auxiliary loss lets the dead features explain what is left of the *output* (Gao et al. 2024,
A.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fvu_loss(error: Tensor, target: Tensor) -> Tensor:
    """Squared error over the batch's variance around its mean; ``(B, d)`` both."""
    return error.square().sum() / variance(target)


def variance(target: Tensor) -> Tensor:
    """``sum |y - mean y|^2`` over a batch ``(B, d)``, at least a tiny number."""
    total = (target - target.mean(0)).square().sum()
    return total.clamp_min(torch.finfo(total.dtype).tiny ** 0.5)


def mse_loss(error: Tensor) -> Tensor:
    """Mean squared error."""
    return error.square().mean()


def l1_penalty(activations: Tensor, weights: Tensor, n_positions: int) -> Tensor:
    """Weighted sum of activations per position.

    Args:
        activations: Of any shape; not negative.
        weights: Of each, by broadcasting.
        n_positions: Positions they belong to.
    """
    return (activations * weights).sum() / n_positions


def tanh_penalty(activations: Tensor, weights: Tensor, scale: float, n_positions: int) -> Tensor:
    """A smooth count of active features per position (see ``l1_penalty``)."""
    return (scale * activations * weights).tanh().sum() / n_positions


def l0_penalty(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Active features per position; only the thresholds get a gradient."""
    return _step(pre, threshold, bandwidth).sum() / len(pre)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = _kernel(z, threshold, ctx.bandwidth)
        for_threshold = (-(threshold / ctx.bandwidth) * near * grad).sum(0)
        return torch.where(z > threshold, grad, 0.0), for_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = _kernel(z, threshold, ctx.bandwidth)
        return None, (-near * grad / ctx.bandwidth).sum(0), None


def _kernel(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (((z - threshold) / bandwidth).abs() < 0.5).to(z.dtype)


def jumprelu(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``z 1[z > threshold]`` of ``(B, F)`` and ``(F,)``, with straight-through gradients."""
    out = _JumpReLU.apply(z, threshold, bandwidth)
    assert isinstance(out, Tensor)
    return out


def _step(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    out = _Step.apply(z, threshold, bandwidth)
    assert isinstance(out, Tensor)
    return out


def largest(activations: Tensor, k: int) -> Tensor:
    """The ``k`` largest of each row after a ReLU, the rest zero."""
    values, columns = activations.relu().topk(min(k, activations.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(activations).scatter(-1, columns, values)


def auxiliary_loss(residual: Tensor, revived: Tensor) -> Tensor:
    """How badly dead features explain what the live ones left unexplained.

    Args:
        residual: ``y - y_hat`` at the output site ``(B, d)``; no gradient flows into it.
        revived: What the dead features would write ``(B, d)``.
    """
    residual = residual.detach()
    loss = (residual - revived).square().sum() / variance(residual)
    return torch.nan_to_num(loss)

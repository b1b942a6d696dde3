"""What a normalisation module computes, found by comparing it with what it could be (torch only).

Hugging Face's norms differ in class, in the name of their epsilon and in whether the stored weight
is the gain or the gain minus one (Gemma). No config says so, but their output does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SiteError

#: Largest relative difference that rounding explains, by dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class NormSpec:
    """A LayerNorm (``centred``) or RMSNorm: ``gain * P x / sqrt(mean (P x)^2 + eps) + bias``.

    Attributes:
        gain: ``(d,)`` with Gemma's ``1 + w`` already applied.
        bias: ``(d,)`` or None.
        eps: Added to the mean square.
        centred: Whether ``P`` subtracts the mean; else it is the identity.
    """

    gain: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def scale(self, x: Tensor) -> Tensor:
        """The inverse denominator ``(..., 1)`` of ``x (..., d)``."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def normalise(self, x: Tensor) -> Tensor:
        """Site N0: ``x`` after the division, before gain and bias."""
        scale = self.scale(x)
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * scale

    def site_n0(self, x: Tensor) -> Tensor:
        """``normalise``, in the dtype of ``x`` but computed in float32 at least."""
        return self.normalise(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm itself."""
        out = self.normalise(x) * self.gain
        return out if self.bias is None else out + self.bias


def norm_spec(norm: nn.Module, path: str, x: Tensor) -> NormSpec:
    """Find out what a norm module computes.

    Args:
        norm: The module.
        path: Its path, for messages.
        x: ``(n, d)`` values to compare on, in the module's dtype.

    Raises:
        SiteError: It is neither a LayerNorm nor an RMSNorm with a gain and perhaps a bias.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if any(part is not None and part.shape != x.shape[-1:] for part in (weight, bias)):
        raise SiteError(
            f"{path} ({type(norm).__name__}) is neither a LayerNorm nor an RMSNorm: its weight is "
            f"no gain of shape {tuple(x.shape[-1:])}"
        )
    with torch.no_grad():
        out = norm(x).to(dtype)
    limit, x = TOLERANCE[x.dtype], x.detach().to(dtype)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    # OLMo 1 keeps its epsilon to itself.
    eps_candidates = (0.0, 1e-6, 1e-5) if eps is None else (float(eps),)
    weight = torch.ones_like(x[0]) if weight is None else weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    candidates = [
        NormSpec(gain, bias, value, centred)
        for centred in (False, True)
        for gain in (weight, 1 + weight)
        for value in eps_candidates
    ]
    errors = [relative_difference(spec(x), out) for spec in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    check_norm(f"{path} ({type(norm).__name__})", errors[best], limit)
    return candidates[best]


def check_norm(name: str, difference: float, limit: float) -> None:
    """Check that a norm is what it was taken for.

    Args:
        name: The norm.
        difference: How far (relatively) the nearest LayerNorm or RMSNorm is from it.
        limit: What rounding explains.

    Raises:
        SiteError: It is neither.
    """
    if not difference <= limit:
        raise SiteError(
            f"{name} is neither a LayerNorm nor an RMSNorm: the nearest such norm differs by "
            f"{difference:.1e} (relative)"
        )


def spec_of_probe(name: str, found: Mapping[str, Any], limit: float) -> NormSpec:
    """A norm as ``remote.norm_probe.probe_norm`` found it.

    Raises:
        SiteError: It is neither a LayerNorm nor an RMSNorm.
    """
    check_norm(name, found["difference"], limit)
    return NormSpec(found["gain"], found["bias"], found["eps"], found["centred"])


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def probed_spec(module: nn.Module, path: str, d_model: int) -> NormSpec:
    """``norm_spec`` of a model's norm, found on random values: no run of the model is needed."""
    norm = module.get_submodule(path)
    like = next(iter(norm.parameters()), next(module.parameters()))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, d_model, generator=generator).to(like.device, like.dtype)
    return norm_spec(norm, path, probe)

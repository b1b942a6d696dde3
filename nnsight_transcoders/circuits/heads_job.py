"""What heads add to targets, computed where the model is (torch only: it runs inside a trace).

Vectors go up; a number for each head and source position comes back. The maps stay, and are read
a layer at a time: from the model's weights, or by calling its modules where those have none.

Legend: n targets, T positions, S source positions (as T), D d_model, H heads, K value heads,
g = H / K, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.remote.job_reads import fitted_attention, frozen_norm

from .linear import FrozenAttention, FrozenNorm


@dataclass(frozen=True)
class _Layer:
    """One layer's attention in this job's run, widened.

    Attributes:
        attention: Its pattern and maps.
        before: The norm before it, if any.
        after: The norm behind it, if any.
        r: ``(T, D)`` the block's input.
        difference: How far (relatively) this attention is from what the model gave.
    """

    attention: FrozenAttention
    before: FrozenNorm | None
    after: FrozenNorm | None
    r: Tensor
    difference: float

    def constant(self) -> Tensor:
        """What it gives of nothing ``(T, D)``: its biases, and those of its norms."""
        x = torch.zeros_like(self.r)
        for part in (self.before, self.attention, self.after):
            x = x if part is None else part.forward(x)
        return x


def head_terms(
    model: Any, spec: dict[str, Any], vectors: Tensor, positions: Tensor, limits: Tensor
) -> list[dict[str, Any]]:
    """What each head moves into targets.

    Args:
        model: The model, running.
        spec: From ``remote_heads.ServerHeads``.
        vectors: ``(n, D)`` the targets.
        positions: ``(n,)`` where they stand.
        limits: ``(n,)`` how many layers' attention each reads.

    Returns:
        Per layer, of the targets that read it: ``terms (m, H, S)``, ``bias (m,)``, and the
        layer's ``difference``.
    """
    found = []
    with torch.no_grad():
        for number in range(int(limits.max())):
            layer = _read(model, spec, spec["layers"][number])
            chosen = limits > number
            at = positions[chosen].to(layer.r.device)
            u = vectors[chosen].to(layer.r)
            bias = (layer.constant()[at] * u).sum(-1)
            pulled = u if layer.after is None else layer.after.adjoint_at(u, at)
            terms = _terms(layer, pulled, at)
            answer = {"terms": terms.cpu(), "bias": bias.cpu(), "difference": layer.difference}
            found.append(answer)
    return found


def _terms(layer: _Layer, vectors: Tensor, at: Tensor) -> Tensor:
    """``(n, H, S)`` from cotangents ``(n, D)`` behind the output projection."""
    attention, x = layer.attention, layer.r
    x = x if layer.before is None else layer.before.linear(x)
    width, pattern = attention.head_dim, attention.pattern_KgTS
    v_SKE = (x @ attention.W_V.T.to(x.dtype)).unflatten(-1, (-1, width))
    z_nKgE = (vectors @ attention.W_O.to(x.dtype)).unflatten(-1, (*pattern.shape[:2], width))
    weights = pattern[:, :, at].to(x.dtype)
    return torch.einsum("kgns,ske,nkge->nkgs", weights, v_SKE, z_nKgE).flatten(1, 2)


def through_maps(
    model: Any, spec: dict[str, Any], ends: list[tuple[int, Tensor, Tensor, Tensor]]
) -> list[Tensor]:
    """Targets pulled back through single heads, per unit of attention.

    Args:
        model: The model, running.
        spec: See ``head_terms``.
        ends: Per layer, in order: its number, cotangents ``(m, D)``, where they stand ``(m,)``, and
            the head of each ``(m,)``.

    Returns:
        Per layer ``(m, D)``, at what the values are made of.
    """
    found = []
    with torch.no_grad():
        for number, vectors, positions, heads in ends:
            layer = _read(model, spec, spec["layers"][number])
            attention, at = layer.attention, positions.to(layer.r.device)
            u = vectors.to(layer.r)
            u = u if layer.after is None else layer.after.adjoint_at(u, at)
            width, group = attention.head_dim, attention.pattern_KgTS.shape[1]
            heads = heads.to(layer.r.device)
            out_mHE = (u @ attention.W_O.to(u.dtype)).unflatten(-1, (-1, width))
            z_mE = out_mHE[torch.arange(len(u), device=u.device), heads]
            value_mED = attention.W_V.unflatten(0, (-1, width))[heads // group].to(u.dtype)
            found.append((z_mE[:, None] @ value_mED)[:, 0].cpu())
    return found


def attention_constants(model: Any, spec: dict[str, Any], n_layers: int) -> list[Tensor]:
    """What the first layers' attention gives of nothing ``(T, D)``: biases on the way through."""
    with torch.no_grad():
        layers = spec["layers"][:n_layers]
        return [_read(model, spec, layer).constant().cpu() for layer in layers]


def _read(model: Any, spec: dict[str, Any], layer: dict[str, Any]) -> _Layer:
    """A layer as the model comes by it."""
    r = model.get(layer["block"]).input.clone()
    at: dict[str, Any] = {"device": r.device, "dtype": getattr(torch, spec["dtype"])}
    attention, difference = fitted_attention(
        model, layer, r, spec["heads"], spec["out_width"], at["dtype"]
    )
    before, after = (
        None if layer[name] is None else frozen_norm(layer[name], **at)
        for name in ("attention_norm", "attention_post_norm")
    )
    return _Layer(attention, before, after, r.flatten(0, -2).to(**at), difference)

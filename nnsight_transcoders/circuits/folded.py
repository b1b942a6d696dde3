"""The transpose of one frozen block: what a sweep applies, and each head's part of it.

Torch only, like ``linear.py``, whose ``FrozenModel`` uses it: both are shipped by value into remote
traces.

Shape legend: B batch (targets), T positions, D d_model, H query heads, K value heads, g = H / K
heads per value head, E width of a head, S source positions (as T).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .linear import FrozenLayer

#: Source positions per product with the pattern, which is zero where source > destination: what
#: lies above the diagonal of the blocks is not computed.
CAUSAL_BLOCK = 128


class FoldedLayer:
    """The transpose of one block's linear parts, as few matrix products as it takes.

    Gains and centring of norms go into the weights, denominators into copies that are made anyway
    between the products; likewise for the skip path from the output to the input site. The pattern
    is used as it is, not copied.

    Args:
        layer: The block.
        dtype: In which it computes (default: that of the weights).
    """

    def __init__(self, layer: FrozenLayer, dtype: torch.dtype | None = None) -> None:
        attention = layer.attention
        self._pattern, self._head_dim = attention.pattern_KgTS, attention.head_dim
        dtype = attention.W_O.dtype if dtype is None else dtype
        self._out, self._value = attention.W_O.to(dtype), attention.W_V.to(dtype)
        self._before = self._after = self._value.new_ones(attention.pattern.shape[-1])
        if (norm := layer.attention_norm) is not None:
            self._before = norm.scale[:, 0]
            self._value = norm.fold_in(self._value)
        if (norm := layer.attention_post_norm) is not None:
            self._after = norm.scale[:, 0]
            self._out = norm.fold_out(self._out.T).T
        self._skip = self._skip_scale = None
        if layer.skip is not None:
            skip, scale = layer.skip.to(dtype), self._before.new_ones(len(self._before), 1)
            if layer.write is not None:
                skip, scale = layer.write.fold_out(skip.T).T, scale * layer.write.scale
            if layer.read is not None:
                skip, scale = layer.read.fold_in(skip), scale * layer.read.scale
            self._skip, self._skip_scale = skip, scale

    def cross(self, g_BTD: Tensor, crossed: int, positions: Tensor) -> int:
        """Add to cotangents after attention, in place, what comes back through attention.

        Args:
            g_BTD: The cotangents.
            crossed: So many of them have crossed an attention before; the others are zero but for
                the position they stand at, so that little has to be computed for them.
            positions: ``(B,)`` where each target stands.

        Returns:
            B: all have crossed one now.
        """
        if crossed < len(g_BTD):
            self._add_first(g_BTD[crossed:], positions[crossed:])
        if crossed:
            self.add_attention(g_BTD[:crossed], self.values(g_BTD[:crossed]))
        return len(g_BTD)

    def _add_first(self, g_BTD: Tensor, positions: Tensor) -> None:
        """``cross`` of cotangents that stand at one position each: a product per target and head,
        spread over the positions by the pattern's row."""
        n_batch, n_positions, _ = g_BTD.shape
        n_values, group = self._pattern.shape[:2]
        at = torch.arange(n_batch, device=g_BTD.device)
        z = (g_BTD[at, positions] @ self._out) * self._after[positions, None]
        z_KEx = z.view(n_batch, n_values, group, self._head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        w_KxD = z_KEx @ self._value.view(n_values, self._head_dim, -1)
        w_BHD = w_KxD.view(n_values * group, n_batch, -1).transpose(0, 1)
        p_HBS = self._pattern[:, :, positions, :n_positions].flatten(0, 1)
        p_HBS = p_HBS * self._before[:n_positions]
        g_BTD.baddbmm_(p_HBS.permute(1, 2, 0), w_BHD)

    def spread(self, x_TD: Tensor) -> Tensor:
        """What vectors that stand at one position each add to the stream through attention.

        Args:
            x_TD: One vector per position, before attention.

        Returns:
            ``(T, T, D)``: at the first position, from the vector at the second.
        """
        n_values, group, n_positions = self._pattern.shape[:3]
        v = (x_TD @ self._value.T) * self._before[:, None]
        v_KSE = v.view(n_positions, n_values, self._head_dim).transpose(0, 1)
        out_KgED = self._out.T.reshape(n_values, group, self._head_dim, -1)
        moved_KgSD = v_KSE[:, None] @ out_KgED
        pattern_STH = self._pattern.flatten(0, 1).permute(2, 1, 0).to(x_TD.dtype)
        spread_STD = pattern_STH @ moved_KgSD.flatten(0, 1).transpose(0, 1)
        return spread_STD.transpose(0, 1) * self._after[:, None, None]

    def values(self, g_BTD: Tensor) -> Tensor:
        """Cotangents after attention -> cotangents of the values ``(B * T, K * E)``."""
        n_batch, n_positions, _ = g_BTD.shape
        n_values, group = self._pattern.shape[:2]
        z = (g_BTD.flatten(0, 1) @ self._out).view(
            n_batch, n_positions, n_values, group, self._head_dim
        )
        z_KgTBE = z.new_empty(n_values, group, n_positions, n_batch, self._head_dim)
        after = self._after[:n_positions, None, None]
        torch.mul(z.permute(2, 3, 1, 0, 4), after, out=z_KgTBE)
        v_KSBE = self._mix(z_KgTBE.flatten(3)).unflatten(2, (n_batch, self._head_dim))
        v_BSKE = z.new_empty(n_batch, n_positions, n_values, self._head_dim)
        before = self._before[:n_positions, None, None]
        torch.mul(v_KSBE.permute(2, 1, 0, 3), before, out=v_BSKE)
        return v_BSKE.view(n_batch * n_positions, -1)

    def _mix(self, z_KgTN: Tensor) -> Tensor:
        """The transposed pattern applied to each head, summed over a group: ``(K, S, N)``."""
        n_values, group, n_positions, width = z_KgTN.shape
        mixed = z_KgTN.new_empty(n_values, n_positions, width)
        for start in range(0, n_positions, CAUSAL_BLOCK):
            stop = min(start + CAUSAL_BLOCK, n_positions)
            pattern = self._pattern[:, :, start:n_positions, start:stop].transpose(2, 3)
            pattern = pattern.to(z_KgTN.dtype)
            for member in range(group):
                source = z_KgTN[:, member, start:]
                if member == 0:
                    torch.bmm(pattern[:, member], source, out=mixed[:, start:stop])
                else:
                    mixed[:, start:stop].baddbmm_(pattern[:, member], source)
        return mixed

    def add_attention(self, g_BTD: Tensor, values: Tensor) -> None:
        """Add to ``g``, in place, what comes back through the values."""
        g_BTD.flatten(0, 1).addmm_(values, self._value)

    def head_terms(self, g_D: Tensor, position: int, r_SD: Tensor) -> Tensor:
        """What each head moves from each source position into a cotangent at ``position``.

        Args:
            g_D: The cotangent after attention.
            position: Where it stands.
            r_SD: The residual stream that attention reads, positions up to ``position`` at least.

        Returns:
            ``(H, S)`` with ``S = position + 1``; its sum is attention's linear part.
        """
        n_sources = position + 1
        pattern_KgS = self._weights(position)[..., :n_sources]
        n_values, group, _ = pattern_KgS.shape
        z_KgE = (g_D @ self._out).view(n_values, group, self._head_dim)
        v_SKE = (r_SD[:n_sources] @ self._value.T).view(n_sources, n_values, self._head_dim)
        terms = torch.einsum("kgs,ske,kge->kgs", pattern_KgS, v_SKE, z_KgE)
        return terms.flatten(0, 1)

    def pull_back(self, g_D: Tensor, position: int, head: int, source: int) -> Tensor:
        """The cotangent ``(D,)`` that one head puts at one source position: its OV circuit's
        transpose, times the attention paid."""
        n_values, group = self._pattern.shape[:2]
        value, member = divmod(head, group)
        rows = slice(value * self._head_dim, (value + 1) * self._head_dim)
        z_E = (g_D @ self._out).view(n_values, group, self._head_dim)[value, member]
        return self._weights(position)[value, member, source] * (z_E @ self._value[rows])

    def _weights(self, position: int) -> Tensor:
        """The pattern's row ``(K, g, S)`` of one destination, with the denominators."""
        return self._pattern[:, :, position] * (self._before * self._after[position])

    def skipped(self, g_BTD: Tensor) -> Tensor | None:
        """What comes back through the transcoder's skip path, at the residual stream it reads."""
        if self._skip is None or self._skip_scale is None:
            return None
        return (g_BTD * self._skip_scale[: g_BTD.shape[1]]) @ self._skip

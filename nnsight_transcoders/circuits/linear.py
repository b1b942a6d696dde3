"""The frozen model between MLP outputs and MLP inputs, written down as a linear operator.

With attention patterns, normalisation denominators and MLP outputs frozen at one run's values,
what is left of a transformer between any output site and any later input site is linear. This
module is that map, in both directions, on plain tensors (torch only: it is shipped by value into
remote traces, where gradients may not exist):

* ``FrozenModel.sweep`` takes cotangents down: one sweep gives every edge into a batch of targets;
* ``FrozenModel.replay`` pushes values up, with or without the constant terms.

The two are written separately: ``replay`` applies norms and attention part by part, as the model
does; ``sweep`` uses them folded into three matrix products a layer. Tests hold one against the
other.

Shape legend: B batch (targets, or vectors pushed), T positions, D d_model, H query heads, K value
heads, g = H / K heads per value head, E width of a head, S source positions (as T).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrozenNorm:
    """A LayerNorm or RMSNorm at the denominators of one run: ``x -> gain * P x * scale + bias``.

    ``P`` subtracts the mean over D where ``centred`` (LayerNorm), else it is the identity.

    Attributes:
        gain: ``(D,)`` with Gemma's ``1 + w`` already applied.
        bias: ``(D,)`` or None.
        scale: ``(T, 1)`` the inverse of the denominator at each position.
        centred: Whether the mean is subtracted.
    """

    gain: Tensor
    bias: Tensor | None
    scale: Tensor
    centred: bool

    def linear(self, x_BTD: Tensor) -> Tensor:
        """The map without its bias."""
        return self.fold_out(x_BTD) * self.scale

    def linear_at(self, x_BD: Tensor, positions: Tensor) -> Tensor:
        """``linear`` of vectors that stand at one position each: ``(B, D)`` and ``(B,)``."""
        return self.fold_out(x_BD) * self.scale[positions]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The map with its bias."""
        out = self.linear(x_BTD)
        return out if self.bias is None else out + self.bias

    def adjoint_at(self, g_BD: Tensor, positions: Tensor) -> Tensor:
        """The transpose ``g -> P (gain * g) * scale`` of cotangents that stand at one position
        each: ``(B, D)`` and ``(B,)``."""
        return self.fold_in(g_BD) * self.scale[positions]

    def fold_in(self, rows: Tensor) -> Tensor:
        """``P (gain * row)`` of rows ``(..., D)`` that read this norm's output: the same rows as
        they read its input, but for the denominators."""
        rows = rows * self.gain
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def fold_out(self, rows: Tensor) -> Tensor:
        """``gain * P row`` of rows ``(..., D)`` that write to this norm's input: the same rows as
        they write to its output, but for the denominators."""
        rows = rows - rows.mean(-1, keepdim=True) if self.centred else rows
        return rows * self.gain


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention at the patterns of one run.

    Attributes:
        pattern: ``(H, T, T)``, destination then source; rows may sum to less than one (sinks).
        W_V: ``(K * E, D)`` as a linear layer's weight.
        b_V: ``(K * E,)`` or None.
        W_O: ``(D, H * E)`` as a linear layer's weight.
        b_O: ``(D,)`` or None.
    """

    pattern: Tensor
    W_V: Tensor
    b_V: Tensor | None
    W_O: Tensor
    b_O: Tensor | None

    @property
    def head_dim(self) -> int:
        """E."""
        return self.W_O.shape[1] // self.pattern.shape[0]

    @property
    def pattern_KgTS(self) -> Tensor:
        """The pattern with query heads grouped by the value head they use."""
        return self.pattern.unflatten(0, (self.W_V.shape[0] // self.head_dim, -1))

    def linear(self, x_BTD: Tensor) -> Tensor:
        """Attention without biases."""
        return self._mix(x_BTD @ self.W_V.T)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attention with the biases of values and output."""
        v = x_BTD @ self.W_V.T
        out = self._mix(v if self.b_V is None else v + self.b_V)
        return out if self.b_O is None else out + self.b_O

    def _mix(self, v: Tensor) -> Tensor:
        v_BSKE = v.unflatten(-1, (-1, self.head_dim))
        z = torch.einsum("kgts,...ske->...tkge", self.pattern_KgTS, v_BSKE)
        return z.flatten(-3) @ self.W_O.T


@dataclass(frozen=True)
class FrozenLayer:
    """One block.

    Attributes:
        attention: Its attention.
        attention_norm: The norm before attention, if any.
        attention_post_norm: The norm on attention's output, if any.
        read: From the residual stream to the transcoder's input site; None for the raw stream.
        write: From the transcoder's output site to the residual stream; None where they are one.
        skip: ``(D, D)`` weight ``W_skip`` of the transcoder's affine path, if any.
    """

    attention: FrozenAttention
    attention_norm: FrozenNorm | None
    attention_post_norm: FrozenNorm | None
    read: FrozenNorm | None
    write: FrozenNorm | None
    skip: Tensor | None

    def attend(self, r_BTD: Tensor, *, constants: bool) -> Tensor:
        """What attention adds to the residual stream when it reads ``r``."""
        for part in (self.attention_norm, self.attention, self.attention_post_norm):
            if part is not None:
                r_BTD = part.forward(r_BTD) if constants else part.linear(r_BTD)
        return r_BTD


class FoldedLayer:
    """The transpose of one block's linear parts, as few matrix products as it takes.

    Denominators go into the pattern's rows (after attention) and columns (before it), gains and
    centring into the weights; likewise for the skip path from the output to the input site.

    Args:
        layer: The block.
    """

    def __init__(self, layer: FrozenLayer) -> None:
        attention = layer.attention
        pattern, self._out, self._value = attention.pattern_KgTS, attention.W_O, attention.W_V
        self._head_dim = attention.head_dim
        if (norm := layer.attention_norm) is not None:
            pattern = pattern * norm.scale.view(1, 1, 1, -1)
            self._value = norm.fold_in(self._value)
        if (norm := layer.attention_post_norm) is not None:
            pattern = pattern * norm.scale.view(1, 1, -1, 1)
            self._out = norm.fold_out(self._out.T).T
        self._pattern = pattern
        self._skip = self._skip_scale = None
        if layer.skip is not None:
            skip, scale = layer.skip, pattern.new_ones(pattern.shape[-1], 1)
            if layer.write is not None:
                skip, scale = layer.write.fold_out(skip.T).T, scale * layer.write.scale
            if layer.read is not None:
                skip, scale = layer.read.fold_in(skip), scale * layer.read.scale
            self._skip, self._skip_scale = skip, scale

    def values(self, g_BTD: Tensor) -> Tensor:
        """Cotangents after attention -> cotangents of the values ``(B * T, K * E)``."""
        n_batch, n_positions, _ = g_BTD.shape
        pattern = self._pattern[..., :n_positions, :n_positions]
        n_values, group = pattern.shape[:2]
        z = (g_BTD.flatten(0, 1) @ self._out).view(
            n_batch, n_positions, n_values, group, self._head_dim
        )
        z = z.permute(2, 3, 1, 0, 4).reshape(n_values, group * n_positions, -1)
        mixed = pattern.permute(0, 3, 1, 2).flatten(2) @ z
        mixed = mixed.view(n_values, n_positions, n_batch, self._head_dim)
        return mixed.permute(2, 1, 0, 3).reshape(n_batch * n_positions, -1)

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
        pattern_KgS = self._pattern[:, :, position, :n_sources]
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
        return self._pattern[value, member, position, source] * (z_E @ self._value[rows])

    def skipped(self, g_BTD: Tensor) -> Tensor | None:
        """What comes back through the transcoder's skip path, at the residual stream it reads."""
        if self._skip is None or self._skip_scale is None:
            return None
        return (g_BTD * self._skip_scale[: g_BTD.shape[1]]) @ self._skip

    def skipped_at(self, g_D: Tensor, position: int) -> Tensor:
        """``skipped`` of one cotangent at one position; zero without a skip path."""
        if self._skip is None or self._skip_scale is None:
            return torch.zeros_like(g_D)
        return (g_D * self._skip_scale[position]) @ self._skip


@dataclass(frozen=True)
class Targets:
    """A batch of cotangents to sweep down: where each enters, and with which vector.

    Attributes:
        vector: ``(B, D)``: an encoder row at an input site, or a direction after the final norm.
        layer: ``(B,)`` the layer whose input site it stands at; ``n_layers`` for the final norm.
            Must not increase along the batch.
        position: ``(B,)``.
    """

    vector: Tensor
    layer: Tensor
    position: Tensor


@dataclass(frozen=True)
class Replay:
    """What ``FrozenModel.replay`` gives; shapes as those of the embedding it was given.

    Attributes:
        reads: Per layer, the input-site value.
        outputs: Per layer, the output-site value.
        final: The final norm's output.
    """

    reads: list[Tensor]
    outputs: list[Tensor]
    final: Tensor


@dataclass(frozen=True)
class FrozenModel:
    """The linear model of one run.

    Attributes:
        layers: The blocks in order.
        final_norm: The norm before the unembedding.
        parallel: Whether attention and MLP read the same residual value.
    """

    layers: tuple[FrozenLayer, ...]
    final_norm: FrozenNorm
    parallel: bool

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @cached_property
    def folded(self) -> list[FoldedLayer]:
        """The blocks' transposes; made on first use and kept, a copy of the V and O weights."""
        return [FoldedLayer(layer) for layer in self.layers]

    def to_stream(self, layer: int, vectors: Tensor, positions: Tensor) -> Tensor:
        """What vectors ``(m, D)`` at layer ``layer``'s output site add to the residual stream."""
        write = self.layers[layer].write
        return vectors if write is None else write.linear_at(vectors, positions)

    def sweep(self, targets: Targets) -> Iterator[tuple[int, Tensor]]:
        """Cotangents of the residual stream below the targets, from the top down.

        Targets enter at their own layer, so one sweep serves them all; positions after the last
        target's are cut. The tensors are views of one buffer: use each before the next.

        Yields:
            ``(layer, g)`` with ``g (n, T', D)`` the cotangents at that layer's contribution to the
            stream of the first ``n`` targets (those above it), and at last ``(-1, g)`` with those
            of all targets at the embedding. ``T'`` is the last target's position plus one.
        """
        n_positions = int(targets.position.max()) + 1
        buffer = targets.vector.new_zeros(len(targets.vector), n_positions, targets.vector.shape[1])
        n = self._enter(buffer, targets, self.n_layers, self.final_norm)
        top = int(targets.layer.max().clamp_max(self.n_layers - 1))
        for number in range(top, -1, -1):
            layer, folded, g = self.layers[number], self.folded[number], buffer[:n]
            if n:
                yield number, g
                skipped = folded.skipped(g)
                values = folded.values(g) if self.parallel else None
                if skipped is not None:
                    g += skipped
                if values is not None:
                    folded.add_attention(g, values)
            n = self._enter(buffer, targets, number, layer.read)
            if n and not self.parallel:
                folded.add_attention(buffer[:n], folded.values(buffer[:n]))
        yield -1, buffer

    def _enter(self, buffer: Tensor, targets: Targets, layer: int, norm: FrozenNorm | None) -> int:
        """Put the targets that stand at ``layer``'s input site into their rows of the buffer.

        Returns:
            The number of rows in use: those of all targets at this layer or above.
        """
        rows = (targets.layer == layer).nonzero().flatten()
        vectors, positions = targets.vector[rows], targets.position[rows]
        if norm is not None:
            vectors = norm.adjoint_at(vectors, positions)
        buffer[rows, positions] = vectors
        return int((targets.layer >= layer).sum())

    def replay(
        self, embedding: Tensor, outputs: Sequence[Tensor | None], *, constants: bool
    ) -> Replay:
        """Push values up through the frozen model.

        Args:
            embedding: ``(T, D)`` or ``(B, T, D)`` at the start of the residual stream.
            outputs: Per layer, what to add at the output site (shaped alike), or None for nothing.
                The skip path of a skip transcoder is added by the replay itself.
            constants: Whether to add the constant terms (biases of norms, values and attention
                output). With them and a run's own outputs the replay gives back that run; with
                zero sources it gives what the constants alone contribute; without them it is the
                linear effect of the given values.
        """
        r = embedding
        reads, written = [], []
        for layer, output in zip(self.layers, outputs, strict=True):
            attended = layer.attend(r, constants=constants)
            mid = r if self.parallel else r + attended
            read = _apply(layer.read, mid, constants)
            out = torch.zeros_like(r) if output is None else output
            if layer.skip is not None:
                out = out + read @ layer.skip.T
            reads.append(read)
            written.append(out)
            r = r + attended + _apply(layer.write, out, constants)
        return Replay(reads, written, _apply(self.final_norm, r, constants))


def _apply(norm: FrozenNorm | None, x: Tensor, constants: bool) -> Tensor:
    if norm is None:
        return x
    return norm.forward(x) if constants else norm.linear(x)

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

from .folded import FoldedLayer


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

    def adjoint(self, g_BTD: Tensor) -> Tensor:
        """The transpose of ``linear``, of cotangents at the first T positions."""
        return self.fold_in(g_BTD) * self.scale[: g_BTD.shape[-2]]

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
        pattern: ``(H, T, T)``, destination then source; rows may sum to less than one (sinks). In
            the dtype of the run, which may be narrower than that of the weights: it is by far the
            largest part of a long prompt, so it is converted piece by piece where it is used.
        W_V: ``(K * E, D)`` as a linear layer's weight, in the model's dtype; so are the others.
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
        return self._mix(x_BTD @ self.W_V.T.to(x_BTD.dtype))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attention with the biases of values and output."""
        v = x_BTD @ self.W_V.T.to(x_BTD.dtype)
        out = self._mix(v if self.b_V is None else v + self.b_V)
        return out if self.b_O is None else out + self.b_O

    def _mix(self, v: Tensor) -> Tensor:
        mixed = mix_values(self.pattern.to(v.dtype), v, self.head_dim)
        return mixed @ self.W_O.T.to(v.dtype)


def mix_values(pattern: Tensor, values: Tensor, head_dim: int) -> Tensor:
    """Values at every position, mixed by each query head's pattern.

    Args:
        pattern: ``(H, T, S)``; consecutive query heads share a value head.
        values: ``(..., S, K * E)``.
        head_dim: E.

    Returns:
        ``(..., T, H * E)``, what the output projection reads.
    """
    v_SKE = values.unflatten(-1, (-1, head_dim))
    pattern_KgTS = pattern.unflatten(0, (v_SKE.shape[-2], -1))
    return torch.einsum("kgts,...ske->...tkge", pattern_KgTS, v_SKE).flatten(-3)


@dataclass(frozen=True)
class FrozenLayer:
    """One block.

    Attributes:
        attention: Its attention.
        attention_norm: The norm before attention, if any.
        attention_post_norm: The norm on attention's output, if any.
        read: From the residual stream to the transcoder's input site; None for the raw stream.
        write: From the transcoder's output site to the residual stream; None where they are one.
        skip: ``(D, D)`` weight ``W_skip`` of the transcoder's affine path, if any; perhaps in a
            narrower dtype.
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

    def skipped_at(self, g_D: Tensor, position: int) -> Tensor:
        """A cotangent at one position of this block's contribution to the stream, as it comes back
        through the transcoder's skip path at the stream that it reads; zero without one."""
        if self.skip is None:
            return torch.zeros_like(g_D)
        at, g_1D = torch.tensor([position], device=g_D.device), g_D[None]
        if self.write is not None:
            g_1D = self.write.adjoint_at(g_1D, at)
        g_1D = g_1D @ self.skip.to(g_D.dtype)
        return (g_1D if self.read is None else self.read.adjoint_at(g_1D, at))[0]


#: Places where a sweep stops besides the output sites 0, 1, ...: the embedding, and the stream
#: behind the first block's attention (of models whose attention comes before the MLP).
EMBEDDING, ATTENDED = -1, -2


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
        """The blocks' transposes; made on first use and kept, a copy of V (and O) weights."""
        return [FoldedLayer(layer, self.dtype) for layer in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.final_norm.scale.dtype

    def fold(self, number: int) -> FoldedLayer:
        """One of ``folded``; of a half-precision model it is made for the moment and not kept."""
        layer = self.layers[number]
        if layer.attention.W_O.dtype == self.dtype or "folded" in self.__dict__:
            return self.folded[number]
        return FoldedLayer(layer, self.dtype)

    def to_stream(self, layer: int, vectors: Tensor, positions: Tensor) -> Tensor:
        """What vectors ``(m, D)`` at layer ``layer``'s output site add to the residual stream."""
        write = self.layers[layer].write
        return vectors if write is None else write.linear_at(vectors, positions)

    def at_output(self, layer: int, g_BTD: Tensor) -> Tensor:
        """Cotangents of layer ``layer``'s contribution to the stream, at its output site."""
        write = self.layers[layer].write
        return g_BTD if write is None else write.adjoint(g_BTD)

    def sweep(self, targets: Targets) -> Iterator[tuple[int, Tensor]]:
        """Cotangents of the residual stream below the targets, from the top down.

        Targets enter at their own layer, so one sweep serves them all; positions after the last
        target's are cut. The tensors are views of one buffer: use each before the next.

        Yields:
            ``(layer, g)`` with ``g (n, T', D)`` the cotangents at that layer's contribution to the
            stream of the first ``n`` targets (those above it), and at last ``(-1, g)`` with those
            of all targets at the embedding; before that, where attention comes before the MLP,
            ``(-2, g)`` with those behind the first block's attention. ``T'`` is the last target's
            position plus one.
        """
        n_positions = int(targets.position.max()) + 1
        buffer = targets.vector.new_zeros(len(targets.vector), n_positions, targets.vector.shape[1])
        n, crossed = self._enter(buffer, targets, self.n_layers, self.final_norm), 0
        top = int(targets.layer.max().clamp_max(self.n_layers - 1))
        for number in range(top, -1, -1):
            layer, folded, g = self.layers[number], self.fold(number), buffer[:n]
            if n:
                yield number, g
                skipped = folded.skipped(g)
                if self.parallel:
                    crossed = folded.cross(g, crossed, targets.position[:n])
                if skipped is not None:
                    g += skipped
            n = self._enter(buffer, targets, number, layer.read)
            if n and not self.parallel:
                if number == 0:
                    yield ATTENDED, buffer
                crossed = folded.cross(buffer[:n], crossed, targets.position[:n])
        yield EMBEDDING, buffer

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
                out = out + read @ layer.skip.T.to(read.dtype)
            reads.append(read)
            written.append(out)
            r = r + attended + _apply(layer.write, out, constants)
        return Replay(reads, written, _apply(self.final_norm, r, constants))


def _apply(norm: FrozenNorm | None, x: Tensor, constants: bool) -> Tensor:
    if norm is None:
        return x
    return norm.forward(x) if constants else norm.linear(x)

"""The frozen model between MLP outputs and MLP inputs, written down as a linear operator.

With attention patterns, normalisation denominators and MLP outputs frozen at one run's values,
what is left of a transformer between any output site and any later input site is linear. This
module is that map, in both directions, on plain tensors (torch only: it is shipped by value into
remote traces, where gradients may not exist):

* ``FrozenModel.sweep`` takes cotangents down: one sweep gives every edge into a batch of targets;
* ``FrozenModel.replay`` pushes values up, with or without the constant terms.

Shape legend: T positions, B batch (targets, or vectors pushed), D d_model, H query heads, K value
heads, g = H / K heads per value head, E width of a head. Residual-stream tensors are ``_TBD``:
position first, so that "all targets at one position" is a contiguous matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrozenNorm:
    """A LayerNorm or RMSNorm at the denominators of one run: ``x -> gain * P x * scale + bias``.

    ``P`` subtracts the mean over D where ``centred`` (LayerNorm), else it is the identity.

    Attributes:
        gain: ``(D,)`` with Gemma's ``1 + w`` already applied.
        bias: ``(D,)`` or None.
        scale: ``(T, 1, 1)`` the inverse of the denominator at each position.
        centred: Whether the mean is subtracted.
    """

    gain: Tensor
    bias: Tensor | None
    scale: Tensor
    centred: bool

    def linear(self, x_TBD: Tensor) -> Tensor:
        """The map without its bias."""
        if self.centred:
            x_TBD = x_TBD - x_TBD.mean(-1, keepdim=True)
        return x_TBD * self.scale[: x_TBD.shape[0]] * self.gain

    def forward(self, x_TBD: Tensor) -> Tensor:
        """The map with its bias."""
        out = self.linear(x_TBD)
        return out if self.bias is None else out + self.bias

    def adjoint(self, g_TBD: Tensor) -> Tensor:
        """The transpose of ``linear``: ``g -> P (gain * g) * scale``."""
        return self._adjoint(g_TBD, self.scale[: g_TBD.shape[0]])

    def adjoint_at(self, g_BD: Tensor, positions: Tensor) -> Tensor:
        """``adjoint`` of cotangents that stand at one position each: ``(B, D)`` and ``(B,)``."""
        return self._adjoint(g_BD, self.scale[positions].view(-1, 1))

    def _adjoint(self, g: Tensor, scale: Tensor) -> Tensor:
        g = g * self.gain
        if self.centred:
            g -= g.mean(-1, keepdim=True)
        g *= scale
        return g


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

    def _grouped(self, n_positions: int) -> tuple[Tensor, int, int]:
        """The pattern as ``(K, g, T, T)``, and E and g."""
        n_heads = self.pattern.shape[0]
        head_dim = self.W_O.shape[1] // n_heads
        n_values = self.W_V.shape[0] // head_dim
        pattern = self.pattern[:, :n_positions, :n_positions]
        return pattern.unflatten(0, (n_values, -1)), head_dim, n_heads // n_values

    def _mix(self, v_TBX: Tensor) -> Tensor:
        """Values ``(T, B, K * E)`` -> attention's output before its bias ``(T, B, D)``."""
        pattern_KgTS, head_dim, _ = self._grouped(v_TBX.shape[0])
        v_SBKE = v_TBX.unflatten(-1, (-1, head_dim))
        z = torch.einsum("kgts,sbke->tbkge", pattern_KgTS, v_SBKE)
        return z.flatten(2) @ self.W_O.T

    def linear(self, x_TBD: Tensor) -> Tensor:
        """Attention without biases."""
        return self._mix(x_TBD @ self.W_V.T)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """Attention with the biases of values and output."""
        v = x_TBD @ self.W_V.T
        out = self._mix(v if self.b_V is None else v + self.b_V)
        return out if self.b_O is None else out + self.b_O

    def adjoint(self, g_TBD: Tensor) -> Tensor:
        """The transpose of ``linear``: the pulled-back vectors ``P^T g W_O W_V``."""
        pattern_KgTS, head_dim, group = self._grouped(g_TBD.shape[0])
        z_TBKgE = (g_TBD @ self.W_O).unflatten(-1, (-1, group, head_dim))
        v_SBKE = torch.einsum("kgts,tbkge->sbke", pattern_KgTS, z_TBKgE)
        return v_SBKE.flatten(2) @ self.W_V


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

    def attend(self, r_TBD: Tensor, *, constants: bool) -> Tensor:
        """What attention adds to the residual stream when it reads ``r``."""
        chain = (self.attention_norm, self.attention, self.attention_post_norm)
        for part in chain:
            if part is not None:
                r_TBD = part.forward(r_TBD) if constants else part.linear(r_TBD)
        return r_TBD

    def attend_adjoint(self, g_TBD: Tensor) -> Tensor:
        """The transpose of ``attend`` without constants."""
        for part in (self.attention_post_norm, self.attention, self.attention_norm):
            if part is not None:
                g_TBD = part.adjoint(g_TBD)
        return g_TBD

    def read_adjoint(self, g_TBD: Tensor) -> Tensor:
        """From cotangents at the input site to cotangents at the residual stream."""
        return g_TBD if self.read is None else self.read.adjoint(g_TBD)


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
    """What ``FrozenModel.replay`` gives.

    Attributes:
        reads: Per layer, the input-site value ``(T, B, D)``.
        outputs: Per layer, the output-site value ``(T, B, D)``.
        final: The final norm's output ``(T, B, D)``.
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

    def sweep(self, targets: Targets) -> Iterator[tuple[int, Tensor]]:
        """Cotangents at every output site below the targets, from the top down.

        Targets enter at their own layer, so one sweep serves them all; positions after the last
        target's are cut.

        Yields:
            ``(layer, g)`` with ``g (T', n, D)`` the cotangents at that layer's output site of the
            first ``n`` targets (those above it), and at last ``(-1, g)`` with those of all targets
            at the embedding. ``T'`` is the last target's position plus one.
        """
        n_positions = int(targets.position.max()) + 1
        width = targets.vector.shape[1]
        g = targets.vector.new_zeros(n_positions, 0, width)
        g = self._enter(g, targets, self.n_layers, self.final_norm)
        for number in range(int(targets.layer.max().clamp_max(self.n_layers - 1)), -1, -1):
            layer = self.layers[number]
            g_write = g if layer.write is None else layer.write.adjoint(g)
            if g.shape[1]:
                yield number, g_write
            if layer.skip is not None and g.shape[1]:
                skipped = layer.read_adjoint(g_write @ layer.skip)
            else:
                skipped = None
            if self.parallel:
                below = g + layer.attend_adjoint(g) if g.shape[1] else g
                g = below if skipped is None else below + skipped
                g = self._enter(g, targets, number, layer.read)
            else:
                g = g if skipped is None else g + skipped
                g = self._enter(g, targets, number, layer.read)
                g = g + layer.attend_adjoint(g)
        yield -1, g

    def _enter(
        self, g_TBD: Tensor, targets: Targets, layer: int, norm: FrozenNorm | None
    ) -> Tensor:
        """Append the targets that stand at ``layer``'s input site."""
        rows = (targets.layer == layer).nonzero().flatten()
        if not len(rows):
            return g_TBD
        vectors, positions = targets.vector[rows], targets.position[rows]
        if norm is not None:
            vectors = norm.adjoint_at(vectors, positions)
        new = g_TBD.new_zeros(g_TBD.shape[0], len(rows), g_TBD.shape[2])
        new[positions, torch.arange(len(rows), device=new.device)] = vectors
        return torch.cat([g_TBD, new], dim=1)

    def replay(
        self, embedding: Tensor, outputs: Sequence[Tensor | None], *, constants: bool
    ) -> Replay:
        """Push values up through the frozen model.

        Args:
            embedding: ``(T, B, D)`` at the start of the residual stream.
            outputs: Per layer, ``(T, B, D)`` to add at the output site, or None for nothing. The
                skip path of a skip transcoder is added by the replay itself.
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

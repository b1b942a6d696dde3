"""The activation functions of published transcoders, as small modules (torch only).

Each maps pre-activations ``(..., d_transcoder)`` to activations of the same shape and dtype. They
are kept apart from the transcoder so that a checkpoint reader only has to name one.

==========  =====================================================================================
name        activation
==========  =====================================================================================
relu        ``max(z, 0)``
jumprelu    ``z * 1[z > threshold]``, one threshold per feature (Rajamanoharan et al. 2024)
topk        the k largest per position, with or without a ReLU before (Gao et al. 2024)
batchtopk   at inference a JumpReLU with one stored threshold (Bussmann et al. 2024)
grouptopk   the k largest inside each of ``n_groups`` equal, contiguous groups of features
jointtopk   ``max(z, 0)``, of which the k with the largest activation times decoder norm stay, over
            the features of *all layers* together: a layer alone only knows its ReLU
==========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import ConfigError

ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk", "grouptopk", "jointtopk")


class ReLU(nn.Module):
    """``max(z, 0)``."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(z)


class JumpReLU(nn.Module):
    """``z * 1[z > threshold]``: values pass unchanged above the threshold and are zero below.

    Args:
        threshold: ``(d_transcoder,)``, or ``()`` for one threshold shared by all features.
    """

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z > self.threshold, z, 0.0)  # not a product: -inf * 0 is NaN


class TopK(nn.Module):
    """Keep the ``k`` largest pre-activations of each position and zero the rest.

    Args:
        k: How many to keep, at least 1 and at most ``d_transcoder``.
        relu_first: Apply a ReLU before choosing (sparsify does; circuit-tracer and the "Peek"
            layout do not, so there a kept value can be negative).
    """

    def __init__(self, k: int, relu_first: bool = True) -> None:
        super().__init__()
        self.k, self.relu_first = k, relu_first

    def forward(self, z: Tensor) -> Tensor:
        if self.relu_first:
            z = torch.relu(z)
        values, indices = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, indices, values)

    def extra_repr(self) -> str:
        return f"k={self.k}, relu_first={self.relu_first}"


class BatchTopK(JumpReLU):
    """BatchTopK at inference: a ReLU followed by one threshold that training has stored."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(torch.relu(z))


class GroupTopK(nn.Module):
    """Keep the ``k`` largest pre-activations inside each of ``n_groups`` contiguous groups."""

    def __init__(self, k: int, n_groups: int, relu_first: bool = True) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.topk = TopK(k, relu_first)

    def forward(self, z: Tensor) -> Tensor:
        grouped = z.unflatten(-1, (self.n_groups, -1))
        return self.topk(grouped).flatten(-2)

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}"


class JointTopK(ReLU):
    """The part of a joint TopK that one layer can compute: its ReLU.

    Which of the activations stay is only known when all layers have been encoded (``keep_joint``).
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def extra_repr(self) -> str:
        return f"k={self.k}"


def keep_joint(
    activations: Mapping[int, Tensor], decoder_norms: Mapping[int, Tensor], k: int
) -> dict[int, Tensor]:
    """Keep, per position, the ``k`` features of all layers that write the most; zero the rest.

    Args:
        activations: Layer -> ``(..., d_transcoder)``, after the ReLU.
        decoder_norms: Layer -> ``(d_transcoder,)``: norm of all that a feature writes.
        k: How many stay.
    """
    scores = torch.cat([acts * decoder_norms[layer] for layer, acts in activations.items()], dim=-1)
    chosen = scores.topk(min(k, scores.shape[-1]), dim=-1, sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    widths = [acts.shape[-1] for acts in activations.values()]
    masks = kept.split(widths, dim=-1)
    return {
        layer: torch.where(mask, acts, 0.0)
        for (layer, acts), mask in zip(activations.items(), masks, strict=True)
    }


def check_activation(name: str, d_transcoder: int, k: int | None, n_groups: int | None) -> None:
    """Check an activation's parameters against the width.

    Raises:
        ConfigError: Naming the parameter that is missing or out of range.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    if name not in ("topk", "grouptopk", "jointtopk"):
        return
    width = d_transcoder
    if name == "grouptopk":
        if not isinstance(n_groups, int) or n_groups < 1 or d_transcoder % n_groups:
            raise ConfigError(
                f"activation 'grouptopk' needs n_groups that divides d_transcoder={d_transcoder}, "
                f"got {n_groups}"
            )
        width = d_transcoder // n_groups
    if k is None:
        raise ConfigError(f"activation {name!r} needs k (the number of features kept); pass k=...")
    if name == "jointtopk" and type(k) is int and k >= 1:
        return  # counted over all layers, of which one config does not know the number
    if type(k) is not int or not 1 <= k <= width:
        raise ConfigError(f"activation {name!r} needs an integer 1 <= k <= {width}, got k={k!r}")


def make_activation(
    name: str,
    *,
    d_transcoder: int,
    k: int | None = None,
    relu_first: bool = True,
    n_groups: int | None = None,
    threshold: Tensor | None = None,
) -> nn.Module:
    """Build an activation by name.

    Args:
        name: One of ``ACTIVATIONS``.
        d_transcoder: Number of features.
        k: For ``topk``, ``grouptopk`` (there: per group) and ``jointtopk`` (over all layers).
        relu_first: For ``topk`` and ``grouptopk``.
        n_groups: For ``grouptopk``.
        threshold: For ``jumprelu`` and ``batchtopk``: ``(d_transcoder,)`` or ``()``.

    Raises:
        ConfigError: Unknown name, or a parameter that is missing or out of range.
    """
    check_activation(name, d_transcoder, k, n_groups)
    if name == "relu":
        return ReLU()
    if name in ("jumprelu", "batchtopk"):
        if threshold is None:
            threshold = torch.zeros(d_transcoder if name == "jumprelu" else ())
        if threshold.shape not in ((d_transcoder,), ()):
            raise ConfigError(
                f"activation {name!r} needs a threshold of shape ({d_transcoder},) or (), "
                f"got {tuple(threshold.shape)}"
            )
        return JumpReLU(threshold) if name == "jumprelu" else BatchTopK(threshold)
    assert k is not None
    if name == "jointtopk":
        return JointTopK(k)
    if name == "topk":
        return TopK(k, relu_first)
    assert n_groups is not None
    return GroupTopK(k, n_groups, relu_first)

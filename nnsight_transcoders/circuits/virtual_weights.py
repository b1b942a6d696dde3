"""Virtual weights: what one feature does to another whatever the input.

The product of a feature's decoder row with another's encoder row, both as vectors of the residual
stream, directly or through the OV circuit of a head (section 4.1 of Dunefsky, Chlenski, Nanda
2024). Norms count with gain and centring and without denominators, as in ``weights.py``; a head's
circuit counts per unit of attention. A cross-layer feature counts with all that it writes below the
layer that reads. ``connections.py`` searches these weights for the largest.

Legend: n, m features, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .invariant import Head, InvariantModel, invariant_model

#: A layer and some of its features.
Features = tuple[int, Sequence[int] | Tensor]


def virtual_weights(
    model: Any,
    transcoders: TranscoderSet,
    source: Features,
    target: Features,
    *,
    head: Head | None = None,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """How much a unit of each source feature adds to each target feature's pre-activation.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        source: ``(layer, features)`` that write.
        target: ``(layer, features)`` that read, at a later layer.
        head: None for the direct path through the residual stream; ``(layer, head)`` for the path
            through one head's OV circuit, ``(layer, None)`` through all heads of a layer.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. Products with its
            weights are made there; only vectors travel.

    Returns:
        ``(n, m)``, before denominators and attention weights.

    Raises:
        InputError: Nothing that the source writes can reach the target on this path.
    """
    invariant = invariant_model(model, sites, remote)
    if head is not None:
        invariant.check_head(head)
    limit = invariant.limit(target[0], head)
    rows = transcoders.rows(source[0], source[1], "decoder")
    if transcoders.targets(source[0])[0] >= limit:
        through = "" if head is None else f" through the attention of layer {head[0]}"
        raise InputError(
            f"what layer {source[0]}'s features write cannot reach those of layer {target[0]}"
            f"{through}: a path goes upwards"
        )
    written = invariant.written_below(transcoders, source[0], rows, limit)
    read = invariant.read(transcoders, target[0], transcoders.rows(target[0], target[1], "encoder"))
    if head is None:
        return written @ read.T
    return invariant.push(head, written) @ read.T


def read_vectors(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    features: Sequence[int] | Tensor,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """Encoder rows as vectors ``(n, D)`` of the stream: what features read (the paper's *feature
    vectors*); pull them back with ``pull_back`` and look at them with ``de_embed``."""
    rows = transcoders.rows(layer, features, "encoder")
    return invariant_model(model, sites, remote).read(transcoders, layer, rows)


def write_vectors(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    features: Sequence[int] | Tensor,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """Decoder rows as vectors ``(n, D)`` of the stream, a cross-layer feature's summed over the
    layers it writes to; move them with ``push_forward`` and look at them with ``logits_of``."""
    invariant = invariant_model(model, sites, remote)
    rows = transcoders.rows(layer, features, "decoder")
    return invariant.written_below(transcoders, layer, rows, invariant.sites.n_layers)


def pull_back(
    model: Any,
    vectors: Tensor,
    layer: int,
    head: int | None = None,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """Vectors that read the stream after a layer's attention, as they read it before through a
    head: the exact transpose of its OV circuit.

    Args:
        model: An nnsight model.
        vectors: ``(n, D)``, such as ``read_vectors`` of a feature at or above the layer.
        layer: The attention's layer.
        head: Which head; None for all together. Under grouped-query attention, a query head.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. Products with its
            weights are made there; only vectors travel.

    Returns:
        ``(n, D)``, per unit of attention, biases apart.
    """
    invariant = invariant_model(model, sites, remote)
    return invariant.pull((layer, head), _vectors(invariant, vectors))


def push_forward(
    model: Any,
    vectors: Tensor,
    layer: int,
    head: int | None = None,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """What a head writes at a later position of vectors ``(n, D)`` before its layer's attention:
    ``pull_back`` the other way."""
    invariant = invariant_model(model, sites, remote)
    return invariant.push((layer, head), _vectors(invariant, vectors))


def de_embed(
    model: Any, vectors: Tensor, *, sites: Sites | None = None, remote: Remote | None = None
) -> Tensor:
    """How much each token's embedding adds to vectors ``(n, D)`` that read the stream: ``(n, V)``.

    ``de_embed(read_vectors(...))`` is ``de_embeddings``; the vectors may be pulled back before.
    """
    invariant = invariant_model(model, sites, remote)
    return invariant.on_tokens(_vectors(invariant, vectors))


def logits_of(
    model: Any, vectors: Tensor, *, sites: Sites | None = None, remote: Remote | None = None
) -> Tensor:
    """Direct effect on the logits, less its mean, of vectors ``(n, D)`` in the stream: ``(n, V)``.

    ``logits_of(write_vectors(...))`` is ``logit_effects``; push the vectors forward before, if need
    be.
    """
    invariant = invariant_model(model, sites, remote)
    final = invariant.norm(invariant.sites.final_norm).fold_out(_vectors(invariant, vectors))
    effects = invariant.on_logits(final)
    return effects - effects.mean(-1, keepdim=True)


def _vectors(invariant: InvariantModel, vectors: Tensor) -> Tensor:
    width = invariant.sites.d_model
    if vectors.dim() != 2 or vectors.shape[1] != width or not torch.is_floating_point(vectors):
        raise InputError(
            f"vectors must be floating-point of shape (n, {width}), got {tuple(vectors.shape)}"
        )
    return invariant.cast(vectors)

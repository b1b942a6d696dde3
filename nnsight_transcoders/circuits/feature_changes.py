"""What changed features of one layer write: on the value that its transcoder reads (torch only: it
also runs on a server).

Legend: B rows, T positions, D d_model, n encoded features, m decoded ones, W layers they write to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.activations import make_activation
from nnsight_transcoders.sparse_product import sparse_decode


def set_features(
    layer: int, part: dict[str, Any], x: Tensor
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Set features of a batch whose first row is the one without changes.

    Args:
        layer: Which layer.
        part: What is needed of its transcoder, and what to set (``intervention_rows.layer_rows``).
        x: ``(B, T, D)`` the value at its input site.

    Returns:
        The activations ``(B, k)`` of the k features that are read, or None if there are none; and
        layer -> ``(B, T, D)`` what is to be added at its output site.
    """
    deltas: dict[int, Tensor] = {}
    if part["skip"] is not None:
        deltas[layer] = nn.functional.linear(x - x[:1], part["skip"].to(x))
    if part["encoder"] is None:
        return None, deltas
    computed = _encode(part, x)
    acts, at = computed, None
    if part["settings"] is not None:
        here = {name: value.to(x.device) for name, value in part["settings"].items()}
        at = (here["row"], here["position"], here["column"])
        acts = computed.clone()
        acts[at] = here["factor"].to(x) * computed[0, here["position"], here["column"]]
    change = None
    if part["follow"]:
        change = acts - computed[:1]
    elif at is not None:
        # Where the features are held, against what is held; else against what the row's own MLP
        # answers to.
        change = torch.zeros_like(acts)
        change[at] = (acts - (computed[:1] if part["pinned"] else computed))[at]
    if change is not None:
        for target, written in _written(part, change).items():
            deltas[target] = deltas.get(target, 0) + written
    if part["read"] is None:
        return None, deltas
    positions, columns = (part["read"][name].to(x.device) for name in ("position", "column"))
    return acts[:, positions, columns], deltas


def _encode(part: dict[str, Any], x: Tensor) -> Tensor:
    """Activations ``(B, T, n)``."""
    threshold = part["threshold"]
    activation = make_activation(
        **part["activation"],
        d_transcoder=len(part["encoder"]),
        threshold=None if threshold is None else threshold.to(x),
    )
    acts = activation(nn.functional.linear(x, part["encoder"].to(x), part["encoder_bias"].to(x)))
    acts[:, : part["leading_positions"]] = 0
    return acts


def _written(part: dict[str, Any], change: Tensor) -> dict[int, Tensor]:
    """Layer -> what changed features ``(B, T, n)`` write to its output ``(B, T, D)``."""
    if part["decoded"] is not None:
        change = change[..., part["decoded"].to(change.device)]
    decoder, targets = part["decoder"].to(change), part["targets"]
    table = decoder.reshape(-1, decoder.shape[-1])
    return {
        target: sparse_decode(change, table, stride=len(targets), offset=j)
        for j, target in enumerate(targets)
    }

"""Edits of features inside a trace of an attached model: set, ablate, scale, steer.

They work on what ``replaced.transcoders[layer]`` reads and writes, here and in a remote job. These
functions then travel to the server with the user's block, which is why they are in a module of
their own that knows nothing of sets and sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from nnsight_transcoders.errors import InputError


def set_features(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    value: float | Tensor,
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: set features to a value.

    Args:
        replaced: What ``attach`` returned.
        layer: Which layer.
        features: Feature number or numbers ``(n,)``.
        value: A number, or a tensor that broadcasts to ``(batch, pos, n)``.
        positions: In each prompt's own tokens, padding not counted; negative ones count from its
            end. Default: everywhere.
    """
    edit_features(replaced, layer, features, positions, lambda old: torch.zeros_like(old) + value)


def ablate(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: set features to zero (see ``set_features``)."""
    edit_features(replaced, layer, features, positions, torch.zeros_like)


def scale(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    factor: float | Tensor,
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: multiply features by a factor (see ``set_features``)."""
    edit_features(replaced, layer, features, positions, lambda old: old * factor)


def steer(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    amount: float | Tensor,
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: add to features, which adds ``amount`` times their decoder rows to the output
    (see ``set_features``)."""
    edit_features(replaced, layer, features, positions, lambda old: old + amount)


def edit_features(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    positions: int | Sequence[int] | None,
    change: Callable[[Tensor], Tensor],
) -> None:
    """Inside a trace: change features at some positions by a function of their old values."""
    mounted = replaced.__dict__.get("transcoders")
    if mounted is None:
        raise InputError("this model has no transcoders attached: use what attach() returned")
    if layer not in mounted.layers:
        there = ", ".join(map(str, mounted.layers))
        raise InputError(f"layers {there} have transcoders, not {layer}")
    try:
        Mediator.current("features.output")
    except ValueError as error:
        raise InputError(
            "features are edited inside a trace: `with replaced.trace(prompt): ...`"
        ) from error
    node = mounted[layer]
    index = node.columns(features)
    acts = node.features.output
    # The index of the running invoke's rows. ``node.token_index.output`` is the same, but the model
    # is past that location by now.
    token_index = invoke_rows(node.current_token_index)
    where = positions_mask(token_index, positions)[..., None]
    index = index.to(acts.device)
    old = acts[..., index]
    edited = acts.clone()
    edited[..., index] = torch.where(where, change(old).to(old.dtype), old)
    node.features.output = edited


def invoke_rows(value: Tensor) -> Tensor:
    """The rows of a batched value that belong to the running invoke (a view)."""
    mediator = Mediator.current("features.output")
    groups = [m.batch_group for m in mediator.interleaver.mediators if m.batch_group is not None]
    group = mediator.batch_group
    if group is None or len(groups) < 2 or sum(size for _, size in groups) != len(value):
        return value
    return value.narrow(0, group[0], group[1])


def positions_mask(token_index: Tensor, positions: int | Sequence[int] | None) -> Tensor:
    """Mask ``(batch, pos)`` of the positions asked for, in each row's own tokens."""
    if positions is None:
        return token_index >= 0
    wanted = torch.as_tensor([positions] if isinstance(positions, int) else positions)
    wanted = wanted.to(token_index.device).view(1, 1, -1)
    length = token_index.max(dim=1).values.view(-1, 1, 1) + 1
    own = torch.where(wanted < 0, wanted + length, wanted)
    return ((token_index[..., None] == own) & (own >= 0)).any(-1)

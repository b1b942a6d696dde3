"""Where each position of a run stands in its own prompt's tokens (torch only)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What models call the keys and values of earlier steps: since transformers 5.24, and before.
CACHES = ("cache", "past_key_values")


def token_index_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """``(batch, pos)``: each position in its own prompt's tokens, -1 for padding.

    Args:
        args: The model's positional inputs.
        kwargs: Its keyword inputs.
    """
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = args[0] if args else kwargs["inputs_embeds"]
    batch, length = ids.shape[:2]
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        return torch.arange(past, past + length, device=ids.device).expand(batch, length)
    index = mask.long().cumsum(-1) - 1
    return index.masked_fill(mask == 0, -1)[:, -length:]


def continued(index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The next step of a generation, told from the size of a value of that step.

    Args:
        index: ``(batch, pos)`` up to the step before.
        value: Some value of this step with as many rows of width d as it has positions.

    Returns:
        The index of all positions so far, and that of this step's positions: the new ones, or all
            of them where the model keeps no cache and reads everything again.
    """
    batch, total = index.shape
    length = value.numel() // (value.shape[-1] * batch)
    n_new = length - total if length > total else length
    following = index.max(dim=1, keepdim=True).values + 1
    new = following + torch.arange(n_new, device=index.device)
    every = torch.cat([index, new], dim=1)
    return every, every[:, -length:]

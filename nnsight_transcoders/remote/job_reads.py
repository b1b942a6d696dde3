"""What a job reads of a model besides its values: its maps and its unembedding (torch only).

Legend: T positions, D d_model, G targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.attention_weights import Linear, probed_weight, stored_weight

#: Rows of a basis sent through the unembedding at a time: its values are as wide as the vocabulary.
UNEMBED_ROWS = 64


def read_attention(model: Any, layer: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the values are made of ``(T, D)``, attention's output ``(T, D)``, the pattern."""
    x = model.get(layer["value"]).input.clone()
    attended = model.get(layer["out_proj"]).output.clone()
    outputs = model.get(layer["attention"]).output
    pattern = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
    if pattern is None:
        raise RuntimeError(f"{layer['attention']} handed out no attention pattern")
    return x.flatten(0, -2), attended.flatten(0, -2), pattern[0].clone()


def linear_map(
    model: Any, path: str, like: Tensor, dtype: torch.dtype, width: int | None = None
) -> Linear:
    """A linear map of the model, from its weights if they can be seen here, else by calling it."""
    envoy = model.get(path)
    width = like.shape[-1] if width is None else width
    stored = stored_weight(envoy._module, dtype)
    if stored is not None and stored[0].shape[1] == width:
        return stored[0].to(like.device), stored[1]
    return probed_weight(lambda x: envoy(x[None])[0], width, like, dtype)


def token_directions(
    model: Any, path: str, tokens: Tensor, like: Tensor, at: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Demeaned rows of the unembedding ``(G, D)`` and demeaned biases ``(G,)``."""
    envoy, width = model.get(path), like.shape[-1]
    stored = stored_weight(envoy._module, at["dtype"])
    if stored is not None and stored[0].shape[1] == width:
        weight, bias = stored
        rows = weight[tokens] - weight.mean(0)
        bias = torch.zeros(len(weight), **at) if bias is None else bias
        return rows.to(**at), (bias[tokens] - bias.mean()).to(**at)
    zero = envoy(like.new_zeros(1, 1, width))[0, 0].to(**at)
    columns = []
    for part in torch.eye(width, device=like.device, dtype=like.dtype).split(UNEMBED_ROWS):
        logits = envoy(part[None])[0].to(**at) - zero
        columns.append(logits[:, tokens] - logits.mean(1, keepdim=True))
    return torch.cat(columns).T.contiguous(), zero[tokens] - zero.mean()

"""What a job reads of a model besides its values: its maps and its unembedding (torch only).

Legend: T positions, D d_model, G targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.attention_weights import (
    Linear,
    fit_attention,
    other_layouts,
    probed_weight,
    stored_weight,
)
from nnsight_transcoders.circuits.linear import FrozenAttention, FrozenNorm

#: Rows of a basis sent through the unembedding at a time: its values are as wide as the vocabulary.
UNEMBED_ROWS = 64
#: Rows of the unembedding's own weights that are looked at at a time.
VOCABULARY_ROWS = 8192


def frozen_norm(norm: dict[str, Any], device: torch.device, dtype: torch.dtype) -> FrozenNorm:
    """A norm as ``problem.packed_norm`` has packed it."""
    return FrozenNorm(
        norm["gain"].to(device, dtype),
        None if norm["bias"] is None else norm["bias"].to(device, dtype),
        norm["scale"].to(device, dtype),
        norm["centred"],
    )


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


def fitted_attention(
    model: Any,
    layer: dict[str, Any],
    like: Tensor,
    heads: tuple[int, int],
    out_width: int,
    dtype: torch.dtype,
) -> tuple[FrozenAttention, float]:
    """A layer's attention in this run, its maps in the dtype of ``like`` (a value of the residual
    stream), and how far (relatively) its output is from what the model gave, in ``dtype``."""
    x, attended, pattern = read_attention(model, layer)
    at: dict[str, Any] = {"device": like.device, "dtype": dtype}
    return fit_attention(
        pattern,
        linear_map(model, layer["value"], x, like.dtype),
        linear_map(model, layer["out_proj"], like, like.dtype, out_width),
        heads,
        other_layouts(layer["value_layout"]),
        x.to(**at),
        attended.to(**at),
    )


def map_rows(model: Any, path: str, like: Tensor, width: int, rows: Tensor) -> Tensor:
    """Rows ``(n, width)`` of a linear map's weight, in float32 at least."""
    envoy = model.get(path)
    rows, dtype = rows.to(like.device), torch.promote_types(like.dtype, torch.float32)
    stored = stored_weight(envoy._module, like.dtype)
    if stored is not None and stored[0].shape[1] == width:
        return stored[0][rows].to(dtype)
    return probed_weight(lambda x: envoy(x[None])[0], width, like, dtype, rows)[0]


def token_directions(
    model: Any, path: str, tokens: Tensor, like: Tensor, at: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Demeaned rows of the unembedding ``(G, D)`` and demeaned biases ``(G,)``."""
    envoy, width = model.get(path), like.shape[-1]
    stored = stored_weight(envoy._module, like.dtype)
    if stored is not None and stored[0].shape[1] == width:
        weight, bias = stored
        total = torch.zeros(width, **at)
        for part in weight.split(VOCABULARY_ROWS):  # it is large, and may be narrow
            total += part.to(**at).sum(0)
        rows = weight[tokens].to(**at) - total / len(weight)
        bias = torch.zeros(len(weight), **at) if bias is None else bias.to(**at)
        return rows, bias[tokens] - bias.mean()
    zero = envoy(like.new_zeros(1, 1, width))[0, 0].to(**at)
    columns = []
    for part in torch.eye(width, device=like.device, dtype=like.dtype).split(UNEMBED_ROWS):
        logits = envoy(part[None])[0].to(**at) - zero
        columns.append(logits[:, tokens] - logits.mean(1, keepdim=True))
    return torch.cat(columns).T.contiguous(), zero[tokens] - zero.mean()

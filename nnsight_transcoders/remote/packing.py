"""A run as it comes back from a server: only what cannot be worked out again (torch only).

Packing loses nothing. What is exactly the sum of two other values is left out and added up again
on the other side, in the same dtype and so to the same bits; of a causal attention pattern only
the lower triangle travels. ``pack_run`` runs on the server, ``unpack_run`` on the client.

Legend: L layers, T positions, D d_model, H heads, V vocabulary, n positions of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.reads import read_run

from .norm_probe import probe_norm

#: Of ``_block_sum``.
N_ORDERS = 4


def read_packed(
    model: Any,
    parts: dict[str, Any],
    positions: list[int],
    norms: list[dict[str, Any]],
    dtype: str | None,
) -> dict[str, Any]:
    """``read_run`` and what the model's norms compute, packed; runs inside a trace.

    Args:
        model: The model.
        parts: See ``read_run``.
        positions: See ``read_run``.
        norms: What ``probe_norm`` is to be told of each norm.
        dtype: Of what comes back; None for the model's own.
    """
    probed: list[dict[str, Any]] = []

    def prepare(like: Tensor) -> None:
        probed.extend(probe_norm(model, norm, like) for norm in norms)

    with torch.no_grad():
        values = read_run(model, parts, positions, prepare)
        packed = pack_run(values, None if dtype is None else getattr(torch, dtype))
    packed["norms"] = probed
    return packed


def pack_run(values: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """``read_run``'s values without what follows from the others.

    Args:
        values: From ``read_run``; a layer without a pattern has None in its place.
        dtype: Of the result; None leaves them as they are.
    """
    if any(pattern is None for pattern in values["pattern"]):
        return {"without_pattern": [p is None for p in values["pattern"]].index(True)}
    cast = _caster(dtype)
    layers = {name: cast(torch.stack(values[name])) for name in ("attended", "mlp_in", "mlp_out")}
    packed: dict[str, Any] = {"layers": layers, "pattern": _pack_pattern(values["pattern"], cast)}
    for name in ("mid", "mlp_post"):
        packed[name] = cast(torch.stack(values[name]))
    packed["resid"] = cast(torch.stack([*values["resid"], values["final"]]))
    packed["position_embedding"] = _maybe(values["position_embedding"], cast)
    packed["embedding"] = (
        None if packed["position_embedding"] is None else cast(values["embedding"])
    )
    packed["logits"] = cast(values["logits"])
    same = torch.equal(values["probabilities"], values["logits"].float().softmax(-1))
    packed["probabilities"] = None if same and dtype is None else values["probabilities"]
    return _without_sums(packed)


def _without_sums(packed: dict[str, Any]) -> dict[str, Any]:
    """Leave out ``mid``, ``resid`` and ``mlp_post`` where they follow from the rest exactly."""
    resid, mid, post = packed["resid"], packed["mid"], packed["mlp_post"]
    attended = packed["layers"]["attended"]
    packed["sum"] = None
    for order in range(N_ORDERS):
        if torch.equal(_block_sum(order, resid[:-1], attended, mid, post), resid[1:]):
            packed["sum"], packed["resid"] = order, resid[:1].clone()
            break
    packed["parallel"] = torch.equal(mid, resid[:-1])
    if packed["parallel"] or torch.equal(resid[:-1] + attended, mid):
        packed["mid"] = None
    if torch.equal(post, packed["layers"]["mlp_out"]):
        packed["mlp_post"] = None
    return packed


def _block_sum(order: int, here: Tensor, attended: Tensor, mid: Tensor, post: Tensor) -> Tensor:
    """A block's output in one of the orders in which models add up its parts: floating-point sums
    depend on it."""
    if order == 0:
        return mid + post
    if order == 1:
        return (attended + post) + here
    return (post + here) + attended if order == 2 else (attended + here) + post


def _pack_pattern(patterns: list[Tensor], cast: Any) -> Tensor:
    """``(L, H, T, T)``, or the lower triangles ``(L, H, T * (T + 1) / 2)`` if that is all."""
    pattern = cast(torch.stack(patterns))
    if bool(pattern.triu(1).any()):
        return pattern
    rows, columns = torch.tril_indices(*pattern.shape[-2:], device=pattern.device)
    return pattern[..., rows, columns].contiguous()


def _caster(dtype: torch.dtype | None) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach() if dtype is None else tensor.detach().to(dtype)

    return cast


def _maybe(tensor: Tensor | None, cast: Any) -> Tensor | None:
    return None if tensor is None else cast(tensor)


def unpack_run(packed: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``collect.Run`` but for the token ids."""
    layers, post = packed["layers"], packed["mlp_post"]
    attended, mlp_out = layers["attended"], layers["mlp_out"]
    post = mlp_out if post is None else post
    resid, mids = [packed["resid"][0]], []
    for layer in range(len(attended)):
        here = resid[layer]
        if packed["mid"] is not None:
            mids.append(packed["mid"][layer])
        else:
            mids.append(here if packed["parallel"] else here + attended[layer])
        if packed["sum"] is None:
            resid.append(packed["resid"][layer + 1])
        else:
            parts = (here, attended[layer], mids[layer], post[layer])
            resid.append(_block_sum(packed["sum"], *parts))
    probabilities = packed["probabilities"]
    if probabilities is None:
        probabilities = packed["logits"].float().softmax(-1)
    embedding = packed["embedding"]
    return {
        "embedding": resid[0] if embedding is None else embedding,
        "position_embedding": packed["position_embedding"],
        "resid": resid[:-1],
        "pattern": _unpack_pattern(packed["pattern"], attended.shape[1]),
        "attended": list(attended),
        "mid": mids,
        "mlp_in": list(layers["mlp_in"]),
        "mlp_out": list(mlp_out),
        "mlp_post": list(post),
        "final": resid[-1],
        "logits": packed["logits"],
        "probabilities": probabilities,
    }


def _unpack_pattern(packed: Tensor, n_positions: int) -> list[Tensor]:
    if packed.dim() == 4:
        return list(packed)
    rows, columns = torch.tril_indices(n_positions, n_positions)
    pattern = packed.new_zeros(*packed.shape[:2], n_positions, n_positions)
    pattern[..., rows, columns] = packed
    return list(pattern)

"""Products with a model's weights, computed where the model is (torch only: it runs inside a trace
there). Vectors go up, their products come back; the weights stay.

Weights are read where the job can see them and asked for through their modules where it cannot (a
sandboxed job), exactly in either case (``attention_weights.probed_weight``).

Legend: n vectors, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.remote.job_reads import (
    UNEMBED_ROWS,
    VOCABULARY_ROWS,
    linear_map,
    read_attention,
    token_directions,
)
from nnsight_transcoders.remote.norm_probe import probe_norm

from .attention_weights import Linear, fit_attention, other_layouts, stored_weight
from .linear import FrozenNorm
from .ov import OVCircuit, head_circuit

#: Rows of the embedding at a time.
TOKEN_ROWS = 4096
#: Elements of products with the whole vocabulary that exist at a time.
PRODUCT_ELEMENTS = 2**26

#: Name of a list of tokens -> their values ``(n, k)`` and ids ``(n, k)``.
TokenLists = dict[str, tuple[Tensor, Tensor]]


def called_norms(model: Any, embed: str, norms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What some norms compute.

    Args:
        model: The model, running.
        embed: The token embedding's path.
        norms: What ``probe_norm`` is told of each.
    """
    like = model.get(embed).output
    with torch.no_grad():
        return [probe_norm(model, norm, like) for norm in norms]


def head_maps(model: Any, spec: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """The value rows ``(m, D)`` and output columns ``(D, m)`` of some heads' OV circuit, norms
    folded in, and the difference (see ``through_heads``)."""
    with torch.no_grad():
        circuit, difference = _circuit(model, spec)
        return circuit.value.cpu(), circuit.out.cpu(), difference


def through_heads(
    model: Any, spec: dict[str, Any], vectors: Tensor, transposed: bool
) -> tuple[Tensor, float]:
    """Vectors ``(n, D)`` through some heads' OV circuit, or through its transpose.

    Args:
        model: The model, running on a few tokens, on which the reading of its weights is checked.
        spec: From ``RemoteInvariantModel``.
        vectors: What goes through.
        transposed: ``pull_back`` instead of ``forward``.

    Returns:
        ``(n, D)``, and the relative difference of the attention as it was read from what the model
        gave.
    """
    with torch.no_grad():
        circuit, difference = _circuit(model, spec)
        vectors = vectors.to(circuit.value)
        moved = circuit.pull_back(vectors) if transposed else circuit.forward(vectors)
        return moved.cpu(), difference


def _circuit(model: Any, spec: dict[str, Any]) -> tuple[OVCircuit, float]:
    dtype = getattr(torch, spec["dtype"])
    like = model.get(spec["embed"]).output
    norms = {
        role: None if norm is None else _norm(probe_norm(model, norm, like), dtype)
        for role, norm in spec["norms"].items()
    }
    x, attended, pattern = read_attention(model, spec["layer"])
    value = linear_map(model, spec["layer"]["value"], x, dtype)
    out = linear_map(model, spec["layer"]["out_proj"], x, dtype, spec["out_width"])
    layouts = other_layouts(spec["layer"]["value_layout"])
    attention, difference = fit_attention(
        pattern.to(dtype), value, out, spec["heads"], layouts, x.to(dtype), attended.to(dtype)
    )
    circuit = head_circuit(
        0, attention, norms["before"], norms["after"], spec["chosen"], spec["n_heads"]
    )
    return circuit, difference


def _norm(found: dict[str, Any], dtype: torch.dtype) -> FrozenNorm:
    gain = found["gain"].to(dtype)
    return FrozenNorm(gain, None, gain.new_ones(1, 1), found["centred"])


def token_products(
    model: Any, embed: str, vectors: Tensor, vocab_size: int, scale: float
) -> Tensor:
    """Products of vectors ``(n, D)`` with every token's embedding: ``(n, V)``.

    Args:
        model: The model, running.
        embed: The token embedding's path.
        vectors: What to multiply with.
        vocab_size: V.
        scale: What the embedding module multiplies its weights by.
    """
    envoy = model.get(embed)
    like = envoy.output
    weight = getattr(envoy._module, "weight", None)
    vectors = vectors.to(like.device)
    parts = []
    with torch.no_grad():
        for ids in torch.arange(vocab_size, device=like.device).split(TOKEN_ROWS):
            if weight is None or weight.is_meta:
                rows = envoy(ids[None])[0].to(vectors.dtype) / scale
            else:
                rows = weight[ids].to(vectors)
            parts.append(vectors @ rows.T)
    return torch.cat(parts, dim=1).cpu()


def logit_products(model: Any, embed: str, unembed: str, vectors: Tensor) -> Tensor:
    """Products of vectors ``(n, D)`` with every row of the unembedding: ``(n, V)``."""
    like = model.get(embed).output
    envoy = model.get(unembed)
    vectors = vectors.to(like.device)
    with torch.no_grad():
        stored = stored_weight(envoy._module, like.dtype)
        if stored is not None:
            parts = stored[0].split(VOCABULARY_ROWS)
            return torch.cat([(vectors @ part.to(vectors).T).cpu() for part in parts], dim=1)
        zero = envoy(like.new_zeros(1, 1, like.shape[-1]))[0].to(vectors.dtype)
        if like.dtype == vectors.dtype:
            return (envoy(vectors[None])[0] - zero).cpu()
        # In half precision: the weights themselves, some rows of a basis at a time.
        total = vectors.new_zeros(len(vectors), zero.shape[-1])
        basis = torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)
        for start in range(0, len(basis), UNEMBED_ROWS):
            rows = envoy(basis[start : start + UNEMBED_ROWS][None])[0].to(vectors.dtype) - zero
            total += vectors[:, start : start + UNEMBED_ROWS] @ rows
        return total.cpu()


def listed_tokens(
    model: Any,
    paths: tuple[str, str],
    written: Tensor,
    read: Tensor,
    vocab_size: int,
    scale: float,
    top: int,
) -> TokenLists:
    """``token_lists`` of vectors ``(n, D)``: those that the unembedding reads, and those that read
    the embedding.

    Args:
        model: The model, running.
        paths: Of the token embedding and of the unembedding.
        written: Vectors behind the final norm.
        read: Vectors that read the stream.
        vocab_size: V.
        scale: What the embedding module multiplies its weights by.
        top: k.
    """
    parts = []
    for at in torch.arange(len(written)).split(max(1, PRODUCT_ELEMENTS // vocab_size)):
        effects = logit_products(model, *paths, written[at])
        reads = token_products(model, paths[0], read[at], vocab_size, scale)
        parts.append(token_lists(effects, reads, top))
    return joined_lists(parts)


def token_lists(effects: Tensor, reads: Tensor, top: int) -> TokenLists:
    """The k tokens that vectors raise and lower most and those that they read most, from their
    products with the unembedding and the embedding ``(n, V)``."""
    effects = effects - effects.mean(-1, keepdim=True)
    found = {
        "top_logits": effects.topk(top),
        "bottom_logits": effects.topk(top, largest=False),
        "de_embedding": reads.topk(top),
    }
    return {name: (best.values, best.indices) for name, best in found.items()}


def joined_lists(parts: list[TokenLists]) -> TokenLists:
    """Lists of several batches of vectors as one."""
    values = {name: torch.cat([part[name][0] for part in parts]) for name in parts[0]}
    return {name: (v, torch.cat([part[name][1] for part in parts])) for name, v in values.items()}


def linear_maps(
    model: Any, embed: str, maps: list[tuple[str, int]], dtype: str | None
) -> list[Linear]:
    """Weights ``(out, in)`` and biases of some linear modules.

    Args:
        model: The model, running.
        embed: The token embedding's path.
        maps: Path and width of the input of each.
        dtype: Of what comes back; None for the model's.
    """
    like = model.get(embed).output
    wanted = like.dtype if dtype is None else getattr(torch, dtype)
    wide = torch.promote_types(like.dtype, torch.float32)
    found: list[Linear] = []
    with torch.no_grad():
        for path, width in maps:
            weight, bias = linear_map(model, path, like, wide, width)
            bias = None if bias is None else bias.to(wanted).cpu()
            found.append((weight.to(wanted).contiguous().cpu(), bias))
    return found


def unembedding_rows(
    model: Any, embed: str, unembed: str, tokens: list[int], dtype: str
) -> tuple[Tensor, Tensor]:
    """Demeaned rows of the unembedding ``(n, D)`` for some tokens, and their demeaned biases."""
    like = model.get(embed).output
    with torch.no_grad():
        index = torch.tensor(tokens, device=like.device)
        at: dict[str, Any] = {"device": like.device, "dtype": getattr(torch, dtype)}
        rows, bias = token_directions(model, unembed, index, like, at)
        return rows.cpu(), bias.cpu()

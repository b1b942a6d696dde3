"""What an edge request sends up: the frozen norms, the active features' vectors, the errors.

Plain tensors and numbers for ``edge_job.py``. Vectors travel in the narrowest dtype that holds
them exactly: rows of a bfloat16 checkpoint were only widened to float32 to compute with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.collect import Run
from nnsight_transcoders.circuits.freeze import MlpSide, attribution_dtype, no_values
from nnsight_transcoders.circuits.layer_features import ActiveFeatures, LayerFeatures
from nnsight_transcoders.circuits.linear import FrozenNorm
from nnsight_transcoders.circuits.targets import TargetSpec
from nnsight_transcoders.norms import TOLERANCE
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import dtype_name

from .payload import tensor_bytes


@dataclass(frozen=True)
class EdgeProblem:
    """The edges of one graph, asked of the server as a whole or in parts.

    Attributes:
        context: What every part needs: norms, sides, targets, settings.
        active: The features and errors.
        embedding: ``(T, D)`` what the tokens write.
    """

    context: dict[str, Any]
    active: ActiveFeatures
    embedding: Tensor

    def whole(self) -> dict[str, Any]:
        """The request for everything at once."""
        return {
            **self.context,
            "sources": {n: packed_features(f) for n, f in self.active.layers.items()},
            "error": narrow(torch.stack(self.active.error)),
            "embedding": narrow(self.embedding),
        }

    def part(self, sources: Tensor, targets: Tensor | None, *, others: bool) -> dict[str, Any]:
        """The request for the edges from some features into some features.

        Args:
            sources: ``(m,)`` numbers of features, increasing.
            targets: ``(n,)`` numbers of features, increasing; None for the logits.
            others: Whether errors and tokens are sources as well; else their columns are zero.
        """
        wanted = None if targets is None else self._select(targets, "decoder")
        return {
            **self.context,
            "sources": self._select(sources, "encoder"),
            "targets": wanted,
            "error": narrow(torch.stack(self.active.error)) if others else None,
            "embedding": narrow(self.embedding if others else torch.zeros_like(self.embedding)),
        }

    def feature_bytes(self, without: str) -> Tensor:
        """``(F,)`` what each feature takes in a request at most, without its encoder or decoder
        row: as if no other feature shared its rows."""
        parts = [torch.zeros(0)]
        for layer in self.active.layers.values():
            if len(layer):
                empty = {without: getattr(layer, without)[..., :0]}
                packed = packed_features(replace(layer, **empty))
                tables = tensor_bytes([packed.pop("encoder"), packed.pop("decoder")])
                each = tensor_bytes(packed) / len(layer) + tables / max(1, int(layer.row.max()) + 1)
                parts.append(torch.full((len(layer),), each))
        return torch.cat(parts)

    def _select(self, features: Tensor, without: str) -> dict[int, dict[str, Any]]:
        found, start = {}, 0
        for number, layer in self.active.layers.items():
            here = features[(features >= start) & (features < start + len(layer))] - start
            start += len(layer)
            if len(here):
                chosen = layer.select(here)
                empty = {without: getattr(chosen, without)[..., :0]}
                found[number] = packed_features(replace(chosen, **empty))
        return found


def edge_problem(
    sites: Sites,
    run: Run,
    norms: Mapping[str, FrozenNorm],
    sides: Sequence[MlpSide],
    active: ActiveFeatures,
    chosen: TargetSpec,
    position: int,
    settings: Mapping[str, Any],
) -> EdgeProblem:
    """Write down a graph's edges as a request.

    Args:
        sites: The model's sites.
        run: Its run.
        norms: From ``freeze_norms``.
        sides: From ``mlp_sides``.
        active: From ``active_features``.
        chosen: The targets; without directions where those are tokens.
        position: Where they stand.
        settings: ``max_nodes``, ``memory`` and ``result_dtype``.

    Raises:
        SiteError: An attention whose values no one module makes.
    """
    for layer in sites.layers:
        if layer.value is None:
            raise no_values(layer)
    dtype = attribution_dtype(run.final.dtype)
    tokens = bool((chosen.index >= 0).all())
    context = {
        "embed": sites.embed,
        "unembed": sites.unembed,
        "final_norm": sites.final_norm,
        "parallel": sites.parallel,
        "d_model": sites.d_model,
        "heads": (sites.n_value_heads, sites.head_dim),
        "out_width": sites.n_heads * sites.head_dim,
        "n_positions": run.n_positions,
        "position": position,
        "dtype": dtype_name(dtype),
        "limit": TOLERANCE[run.final.dtype],
        "norms": {path: packed_norm(norm) for path, norm in norms.items()},
        "layers": [
            {
                "attention": layer.attention,
                "value": layer.value,
                "value_layout": layer.value_layout,
                "out_proj": layer.out_proj,
                "attention_norm": layer.attention_norm,
                "attention_post_norm": layer.attention_post_norm,
                "read": _read(layer.mlp_norm, side),
                "write": layer.mlp_post_norm if side.write is not None else None,
                "skip": None if side.skip is None else narrow(side.skip),
            }
            for layer, side in zip(sites.layers, sides, strict=True)
        ],
        "biases": [None if bias is None else narrow(bias) for bias in active.bias],
        "position_embedding": run.position_embedding,
        "chosen": {
            "index": chosen.index,
            "direction": None if tokens else chosen.direction,
            "total": chosen.total,
            "weight": chosen.weight,
        },
        **settings,
    }
    return EdgeProblem(context, active, run.embedding)


def packed_norm(norm: FrozenNorm) -> dict[str, Any]:
    """A norm as plain data."""
    return {
        "gain": narrow(norm.gain),
        "bias": None if norm.bias is None else narrow(norm.bias),
        "scale": norm.scale,
        "centred": norm.centred,
    }


def _read(path: str | None, side: MlpSide) -> dict[str, Any] | None:
    return None if side.read is None else {"path": path, "plain": side.site == "N0"}


def packed_features(features: LayerFeatures) -> dict[str, Any]:
    """A layer's features as plain data."""
    found = {field.name: getattr(features, field.name) for field in fields(features)}
    return {k: narrow(v) if isinstance(v, Tensor) else v for k, v in found.items()}


def narrow(tensor: Tensor) -> Tensor:
    """The same values in the narrowest dtype that holds them exactly."""
    tensor = tensor.detach()
    if tensor.dtype == torch.int64:
        small = tensor.numel() == 0 or int(tensor.abs().max()) < 2**31
        return tensor.to(torch.int32) if small else tensor
    if not tensor.is_floating_point():
        return tensor
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize < tensor.dtype.itemsize:
            narrowed = tensor.to(dtype)
            if torch.equal(narrowed.to(tensor.dtype), tensor):
                return narrowed.contiguous()
    return tensor.contiguous()

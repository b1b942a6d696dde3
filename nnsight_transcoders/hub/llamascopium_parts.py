"""What llamascopium's per-layer and cross-layer files share: config keys, scales, gates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assembled import scaled
from nnsight_transcoders.hub.snapshot import Snapshot

NAME = "llamascopium"
CONFIG, LM_CONFIG, WEIGHTS = "config.json", "lm_config.json", "sae_weights.safetensors"
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
#: Config keys that have a field of ``TranscoderConfig`` or are used up by the reader.
_KNOWN = {"d_model", "act_fn", "top_k", "hook_point_in", "hook_point_out"}


def layer_of(hook: object, where: str) -> int:
    """``"blocks.3.ln2.hook_normalized"`` -> 3.

    Raises:
        CheckpointError: A hook without a layer.
    """
    found = _BLOCK.match(str(hook))
    if not found:
        raise CheckpointError(f"{where}: hook {hook!r} does not name a layer ('blocks.3. ...')")
    return int(found[1])


def average_key(hook: object) -> str:
    """The name of a hook's average norm in the weights file."""
    return f"dataset_average_activation_norm.{hook}"


def uses_averages(raw: Mapping[str, Any], where: str) -> bool:
    """Whether the weights are for inputs scaled by the dataset's average norm.

    Raises:
        CheckpointError: They are for inputs scaled in a way that no fold undoes.
    """
    norm = raw.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        raise CheckpointError(
            f"{where}: norm_activation {norm!r} scales every input by itself, which cannot be "
            "folded into weights; known: dataset-wise, inference"
        )
    return norm == "dataset-wise"


def scale(
    tensors: Mapping[str, Tensor], raw: Mapping[str, Any], hook: object, d_model: int, where: str
) -> float:
    """``sqrt(d) / average`` of a hook, or 1 where the scales are folded in already.

    Raises:
        CheckpointError: The stored average is not a positive number.
    """
    if raw.get("norm_activation", "dataset-wise") == "inference":
        return 1.0
    average = float(tensors[average_key(hook)])
    if not math.isfinite(average) or average <= 0:
        raise CheckpointError(f"{where}: {average_key(hook)} is {average}, not a positive number")
    return math.sqrt(d_model) / average


def activation(
    raw: Mapping[str, Any], where: str, options: Mapping[str, Any]
) -> tuple[str, int | None]:
    """Our activation's name and k.

    Raises:
        CheckpointError: An activation that depends on the rest of a batch, or TopK without a k.
    """
    name = str(raw.get("act_fn", "relu")).lower()
    if name in ("relu", "jumprelu"):
        return name, None
    if name != "topk":
        raise CheckpointError(
            f"{where}: act_fn {name!r} chooses features over a batch or over layers and is not "
            "read; known: relu, jumprelu, topk"
        )
    k = options.get("k")
    k = raw.get("top_k") if k is None else k
    if not isinstance(k, int):
        raise CheckpointError(
            f"{where}: act_fn is topk, but {CONFIG} has no top_k as a number: pass k=..."
        )
    return "topk", k


def gated(
    found: dict[str, Tensor],
    norms: Tensor,
    raw: Mapping[str, Any],
    kind: str,
    log_threshold: Tensor | None,
    s_in: float,
) -> dict[str, Tensor]:
    """Bring the activation function to where the canonical form has it.

    Args:
        found: The canonical tensors so far; ``W_dec`` has features first.
        norms: ``(n,)`` norms of the stored decoder rows.
        raw: The config.
        kind: The activation.
        log_threshold: ``(n,)``, for JumpReLU.
        s_in: The input's scale.
    """
    scaled_by_norm = raw.get("sparsity_include_decoder_norm", True)
    if kind == "jumprelu":
        assert log_threshold is not None
        threshold = log_threshold.float().exp() / s_in
        if scaled_by_norm:
            # A feature whose decoder row is zero writes nothing: any large number will do for it.
            threshold = torch.where(norms > 0, threshold / norms, 1e4)
        return {**found, "threshold": threshold}
    if kind == "topk" and scaled_by_norm:
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        extra = (1,) * (found["W_dec"].dim() - 1)
        return {
            **found,
            "W_enc": scaled(found["W_enc"], norms[:, None]),
            "b_enc": scaled(found["b_enc"], norms),
            "W_dec": scaled(found["W_dec"], inverse.view(-1, *extra)),
        }
    return found


def fold_names(raw: Mapping[str, Any]) -> list[str]:
    """The folds, for the provenance."""
    folds = []
    if raw.get("norm_activation", "dataset-wise") == "dataset-wise":
        folds.append("dataset average norms")
    if raw.get("sparsity_include_decoder_norm", True) and raw.get("act_fn") in ("jumprelu", "topk"):
        folds.append("decoder norms into the activation")
    return folds


def common_fields(
    snapshot: Snapshot, folder: str, raw: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Config fields that do not depend on the tensors."""
    name = str(PurePosixPath(folder) / LM_CONFIG)
    lm_config = snapshot.json(name) if name in snapshot.files else {}
    model = options.get("base_model") or lm_config.get("model_name")
    return {
        "base_model": model if isinstance(model, str) else None,
        "leading_positions": options.get("leading_positions", 0),
        "source_format": NAME,
        "extra": {key: value for key, value in raw.items() if key not in _KNOWN},
    }

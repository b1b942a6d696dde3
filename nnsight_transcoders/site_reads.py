"""Values at transcoder sites, read as the model runs (torch only: it also travels to servers).

Legend: n rows, T positions, D d_model, m kept positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .norms import NormSpec
from .remote.norm_probe import probe_norm


def read_values(
    model: Any, reads: list[dict[str, Any]], kept: Tensor | None, dtype: str | None
) -> list[Tensor]:
    """Values at some sites; runs inside a trace.

    Args:
        model: An nnsight model, running on token ids ``(n, T)``.
        reads: In the model's order: ``path``, ``input`` (its input or its output), ``shape``
            (n, T), and ``norm``, what ``probe_norm`` is told of the norm whose division makes the
            value at site N0; else None.
        kept: ``(n, T)`` True where values are wanted; None for everywhere.
        dtype: Of what comes back; None for the model's own.

    Returns:
        For each read ``(n, T, D)``, or ``(m, D)`` at the kept positions.
    """
    found: list[Tensor] = []
    last: tuple[Any, Tensor] | None = None
    with torch.no_grad():
        for read in reads:
            place = (read["path"], read["input"])
            if last is None or last[0] != place:
                module = model.get(read["path"])
                value = module.input if read["input"] else module.output
                value = value[0] if isinstance(value, tuple) else value
                last = place, value.clone()
            value = last[1].reshape(*read["shape"], -1)
            value = value if kept is None else value[kept.to(value.device)]
            if read["norm"] is not None:
                value = site_n0(model, read["norm"], value)
            found.append(value if dtype is None else value.to(getattr(torch, dtype)))
    return found


def site_n0(model: Any, norm: dict[str, Any], value: Tensor) -> Tensor:
    """The value behind a norm's division, before its gain, in the dtype of the residual value."""
    return called_norm(model, norm, value).site_n0(value)


def called_norm(model: Any, norm: dict[str, Any], like: Tensor) -> NormSpec:
    """A norm found by calling it.

    Raises:
        ValueError: It is neither a LayerNorm nor an RMSNorm.
    """
    found = probe_norm(model, norm, like)
    if not found["difference"] <= norm["limit"]:
        raise ValueError(
            f"{norm['path']} is neither a LayerNorm nor an RMSNorm: the nearest such norm differs "
            f"by {found['difference']:.1e} (relative)"
        )
    return NormSpec(found["gain"], found["bias"], found["eps"], found["centred"])

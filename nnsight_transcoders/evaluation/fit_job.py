"""Values and next-token cross-entropies of a run, some of whose MLP outputs are given (torch only:
it runs inside a trace, here or on a server). A row's cross-entropy travels, not its logits.

Legend: n rows, T positions, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnsight_transcoders.site_reads import read_values


def values_and_entropies(
    model: Any, reads: list[dict[str, Any]], dtype: str | None, ids: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Values at sites (``site_reads.read_values``) and ``entropies``, in one run."""
    return read_values(model, reads, None, dtype), _entropies(model, ids)


def entropies(model: Any, written: list[dict[str, Any]], ids: Tensor) -> Tensor:
    """Each row's next-token cross-entropies, summed, in nats: ``(n,)`` in float64.

    Args:
        model: The model, running on ``ids``.
        written: In the model's order: what to put in the place of outputs (see ``write``).
        ids: ``(n, T)``.
    """
    write(model, written)
    return _entropies(model, ids)


def written_values(
    model: Any, written: list[dict[str, Any]], reads: list[dict[str, Any]], dtype: str | None
) -> list[Tensor]:
    """Values at sites that come after outputs that are given."""
    write(model, written)
    return read_values(model, reads, None, dtype)


def write(model: Any, written: list[dict[str, Any]]) -> None:
    """Put values in the place of modules' outputs: ``path``, ``value (m, T, D)``, and the first of
    the ``m`` rows that are meant, ``row``."""
    with torch.no_grad():
        for one in written:
            module, value = model.get(one["path"]), one["value"]
            output = module.output
            y, *others = output if isinstance(output, tuple) else (output,)
            # A copy: the model may go on to change it in place (Falcon).
            new = y.reshape(-1, *value.shape[1:]).clone()
            new[one["row"] : one["row"] + len(value)] = value.to(new)
            new = new.reshape(y.shape)
            module.output = (new, *others) if others else new


def _entropies(model: Any, ids: Tensor) -> Tensor:
    logits = model.output.logits
    with torch.no_grad():
        ids = ids.to(logits.device)
        # Row by row: a float32 copy of all logits may be larger than the model.
        rows = [
            F.cross_entropy(row[:-1].float(), actual[1:], reduction="sum").double()
            for row, actual in zip(logits, ids, strict=True)
        ]
        return torch.stack(rows).cpu()

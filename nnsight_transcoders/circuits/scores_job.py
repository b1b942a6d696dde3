"""What an attention's scores are made of, read where the model is (torch only: it runs inside a
trace there).

The module's own code runs on the client (``remote_scores.py``), which has it without its weights.
What it needs of the server are the values that its linear maps give in this run, what it is called
with (rotary embeddings, mask), what its norms compute, and then the rows of the maps that one head
uses: ``2 E D`` numbers.

Legend: T positions, D d_model, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.remote.job_reads import map_rows
from nnsight_transcoders.remote.norm_probe import probe_norm


def attention_call(
    model: Any, path: str, linears: list[str], norms: list[dict[str, Any]]
) -> dict[str, Any]:
    """What an attention module is called with in this run, and what its parts make of that.

    Args:
        model: The model, running.
        path: The attention module.
        linears: Linear maps of it that read its input.
        norms: What ``probe_norm`` is told of its norms.

    Returns:
        ``args`` and ``options`` of the call, as far as they are plain data; per linear map, in
        ``values``, what it gives ``(T, out)`` and what it gives of zeros ``(out,)``; and ``norms``.
    """
    with torch.no_grad():
        args, options = model.get(path).inputs
        x = args[0] if args else options["hidden_states"]
        zero = torch.zeros_like(x[:, :1])
        values = {}
        for name in linears:
            linear = model.get(name)
            values[name] = (linear(x)[0].cpu(), linear(zero)[0, 0].cpu())
        return {
            "args": plain(tuple(args)),
            "options": {name: plain(value) for name, value in options.items()},
            "values": values,
            "norms": [probe_norm(model, norm, x) for norm in norms],
        }


def plain(value: Any) -> Any:
    """Tensors (on the CPU), numbers, strings and tuples of them; None in the place of the rest
    (caches)."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, tuple | list):
        return tuple(plain(one) for one in value)
    return value if isinstance(value, bool | int | float | str) else None


def rows_of_maps(
    model: Any, embed: str, wanted: list[tuple[str, list[int]]], width: int, dtype: str | None
) -> list[Tensor]:
    """Rows ``(n, width)`` of some linear maps' weights.

    Args:
        model: The model, running.
        embed: The token embedding's path.
        wanted: Path and rows of each.
        width: Of the input of all of them.
        dtype: Of what comes back; None for the model's.
    """
    like = model.get(embed).output
    to = like.dtype if dtype is None else getattr(torch, dtype)
    with torch.no_grad():
        return [
            map_rows(model, path, like, width, torch.tensor(rows)).to(to).cpu()
            for path, rows in wanted
        ]

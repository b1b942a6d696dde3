"""The vocabulary's texts, and the tokens that features raise, lower and read.

Legend: F features, V vocabulary, M listed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.circuits.collect import token_texts
from nnsight_transcoders.circuits.virtual_weights import (
    de_embed,
    logits_of,
    read_vectors,
    write_vectors,
)
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

#: Elements of the dense ``(features, V)`` product that exist at a time.
_ELEMENTS = 2**26

#: Name of a list -> (which product it is of, whether the largest are wanted).
LISTS = {"top_logits": True, "bottom_logits": False, "de_embedding": True}


def vocabulary_texts(model: Any, size: int) -> list[str]:
    """The text of each id of the vocabulary."""
    return list(token_texts(model, torch.arange(size)))


def token_lists(
    model: Any,
    transcoders: TranscoderSet,
    layers: Sequence[int],
    top: int,
    sites: Sites,
    remote: Remote | None = None,
    *,
    verbose: bool = False,
) -> dict[str, Tensor]:
    """The tokens that each feature of some layers raises and lowers most, and its de-embedding.

    Returns:
        For each name of ``LISTS``, ``name.token`` ``(F, M)`` int32 and ``name.value`` ``(F, M)``
            float32, the layers' features one after the other.
    """
    parts: dict[str, list[Tensor]] = {}
    chunk = max(1, _ELEMENTS // sites.vocab_size)
    total = sum(transcoders.config(layer).d_transcoder for layer in layers)
    with tqdm(total=total, desc="logits", disable=not verbose, leave=False) as bar:
        for layer in layers:
            for features in torch.arange(transcoders.config(layer).d_transcoder).split(chunk):
                where: dict[str, Any] = {"sites": sites, "remote": remote}
                written = write_vectors(model, transcoders, layer, features, **where)
                effects = logits_of(model, written, **where)
                read = read_vectors(model, transcoders, layer, features, **where)
                reads = de_embed(model, read, **where)
                for name, largest in LISTS.items():
                    dense = reads if name == "de_embedding" else effects
                    best = dense.topk(top, largest=largest)
                    parts.setdefault(f"{name}.token", []).append(best.indices.int().cpu())
                    parts.setdefault(f"{name}.value", []).append(best.values.float().cpu())
                bar.update(len(features))
    return {name: torch.cat(tables) for name, tables in parts.items()}

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
from nnsight_transcoders.circuits.invariant import invariant_model
from nnsight_transcoders.circuits.invariant_job import joined_lists
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

#: Features whose rows are read, and sent to a server, at a time.
AT_A_TIME = 4096


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
        For each of ``top_logits``, ``bottom_logits`` and ``de_embedding``: ``name.token``
            ``(F, M)`` int32 and ``name.value`` ``(F, M)`` float32, the layers' features one after
            the other.
    """
    invariant, parts = invariant_model(model, sites, remote), []
    total = sum(transcoders.config(layer).d_transcoder for layer in layers)
    with tqdm(total=total, desc="logits", disable=not verbose, leave=False) as bar:
        for layer in layers:
            for features in torch.arange(transcoders.config(layer).d_transcoder).split(AT_A_TIME):
                decoder = transcoders.rows(layer, features, "decoder")
                written = invariant.written_below(transcoders, layer, decoder, sites.n_layers)
                encoder = transcoders.rows(layer, features, "encoder")
                read = invariant.read(transcoders, layer, encoder)
                parts.append(invariant.token_lists(written, read, top))
                bar.update(len(features))
    tables: dict[str, Tensor] = {}
    for name, (values, tokens) in joined_lists(parts).items():
        tables[f"{name}.token"], tables[f"{name}.value"] = tokens.int(), values.float()
    return tables

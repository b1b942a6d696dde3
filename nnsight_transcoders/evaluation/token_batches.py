"""Texts as batches of token ids: what is run, and which positions are measured.

Texts are cut into pieces of one context's length. Pieces of one length share a batch; or pieces of
like length do, padded on the right, where padding cannot change what a decoder-only model computes
for the other positions, with masks that say what is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.collect import token_ids_of
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.training.data import opener

#: Of the builtin text, what no training run uses (``train`` counts its seeds from 0).
HELD_OUT_SEED = 9_999
#: Longest piece of a text by default, in tokens: the paper's context.
CONTEXT = 128


@dataclass(frozen=True)
class TokenBatch:
    """Some pieces of text, padded on the right.

    Attributes:
        ids: ``(n, T)`` token ids.
        real: ``(n, T)`` False at padding.
        measured: ``(n, T)`` where features are counted: neither padding nor a special token nor a
            leading position that the set leaves out.
        predicted: ``(n, T)`` where the next token's prediction is measured: a measured position
            that is followed by a token of its own text.
    """

    ids: Tensor
    real: Tensor
    measured: Tensor
    predicted: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        parts = (self.ids, self.real, self.measured, self.predicted)
        return TokenBatch(*(part.to(device) for part in parts))

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        if bool(self.real.all()):
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "attention_mask": self.real.long()}


def special_token_ids(model: Any) -> frozenset[int]:
    """Ids of the tokens that are not text: the tokenizer's, or without one the config's."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return frozenset(tokenizer.all_special_ids)
    config = getattr(hf_module(model, weights=False), "config", None)
    found = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    flat = [i for one in found for i in (one if isinstance(one, list) else [one])]
    return frozenset(i for i in flat if i is not None)


def default_context(sites: Sites) -> int:
    """Longest piece of a text where the caller does not say: 128 tokens, or the model's limit."""
    return min(CONTEXT, sites.max_positions or CONTEXT)


def token_pieces(
    model: Any, data: Any, sites: Sites, *, context: int, max_tokens: int | None = None
) -> list[Tensor]:
    """Token ids ``(T,)`` of 2 to ``context`` tokens each, in the order of the data.

    Args:
        model: An nnsight model; its tokenizer turns texts into tokens.
        data: As ``train`` takes it, or a tokenizer's output, whose ``attention_mask`` says what is
            padding.
        sites: The model's sites.
        context: Longest piece.
        max_tokens: Stop after so many tokens; None: at the end of the data.

    Raises:
        InputError: Nothing of at least two tokens, a context longer than the model's, or ids
            outside the vocabulary.
    """
    pieces = list(stream_pieces(model, data, sites, context=context, max_tokens=max_tokens))
    if not pieces:
        raise InputError("the data has no text of at least two tokens")
    return pieces


def stream_pieces(
    model: Any, data: Any, sites: Sites, *, context: int, max_tokens: int | None = None
) -> Iterator[Tensor]:
    """``token_pieces`` one at a time, without holding the data; nothing for data without text."""
    limit = sites.max_positions
    if context < 2 or (limit is not None and context > limit):
        raise InputError(f"context must be at least 2 and at most {limit}, got {context}")
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens must be at least 2, got {max_tokens}")
    left = max_tokens
    bos = _bos_id(model)
    for ids in _rows(model, data):
        for piece in _cut(ids[:left], context, bos):
            yield token_ids_of(model, piece, sites)
        if left is not None:
            left -= len(ids)
            if left < 2:
                break


def _bos_id(model: Any) -> int | None:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        config = getattr(hf_module(model, weights=False), "config", None)
        return getattr(config, "bos_token_id", None)
    return tokenizer.bos_token_id


def _cut(ids: Tensor, context: int, bos: int | None) -> Iterator[Tensor]:
    """Pieces of a text; where it begins with a BOS, each of them does, as in training."""
    start = ids[:1] if len(ids) and int(ids[0]) == bos else ids[:0]
    for piece in ids[len(start) :].split(context - len(start)):
        if len(start) + len(piece) > 1:
            yield torch.cat([start, piece])


def _rows(model: Any, data: Any) -> Iterator[Tensor]:
    """Each text's token ids ``(T,)``, without padding."""
    if isinstance(data, Mapping):
        if "input_ids" not in data:
            raise InputError(f"data has no 'input_ids', only {', '.join(map(str, data))}")
        ids, mask = torch.as_tensor(data["input_ids"]), data.get("attention_mask")
        kept = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        for row, keep in zip(ids, kept, strict=True):
            yield row[keep.bool()].long()
        return
    for document in opener(data, "text", HELD_OUT_SEED)():
        # A long file comes in pieces, of which the later ones are no plain strings.
        text = document if isinstance(document, str) else getattr(document, "text", None)
        if text is not None:
            yield torch.tensor(_tokenized(model, text), dtype=torch.long)
            continue
        ids = torch.as_tensor(document, dtype=torch.long)
        if ids.dim() != 1:
            raise InputError(f"each text's token ids must have shape (T,), got {tuple(ids.shape)}")
        yield ids


def _tokenized(model: Any, text: str) -> list[int]:
    if getattr(model, "tokenizer", None) is None:
        raise InputError("this model has no tokenizer: give the data as token ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the data is not valid text: {error}") from error
    return model.tokenizer(text, verbose=False)["input_ids"]


def unpadded_batches(pieces: Collection[Tensor], *, batch_size: int) -> list[Tensor]:
    """Pieces of one length together: token ids ``(n, T)`` without padding.

    Args:
        pieces: Token ids ``(T,)`` each.
        batch_size: Pieces per batch, at most.
    """
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for piece in pieces:
        by_length[len(piece)].append(piece)
    return [batch for same in by_length.values() for batch in torch.stack(same).split(batch_size)]


def padded_batches(
    pieces: Collection[Tensor],
    *,
    batch_size: int,
    special: Collection[int],
    leading: int = 0,
) -> list[TokenBatch]:
    """Pieces of like length together, padded on the right.

    Args:
        pieces: Token ids ``(T,)`` each.
        batch_size: Pieces per batch.
        special: Ids that are not measured.
        leading: Leading positions that are not measured.

    Raises:
        InputError: No position is left to measure, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    ordered = sorted(pieces, key=len, reverse=True)
    chunks = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    batches = [_batch(chunk, special, leading) for chunk in chunks]
    if not any(bool(batch.predicted.any()) for batch in batches):
        raise InputError(
            "nothing is left to measure: every position is a special token, one of the "
            f"{leading} leading position(s) that the set leaves out, or a text's last one"
        )
    return batches


def _batch(pieces: list[Tensor], special: Collection[int], leading: int) -> TokenBatch:
    ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    position = torch.arange(ids.shape[1])
    real = position < torch.tensor([len(piece) for piece in pieces])[:, None]
    special_ids = torch.tensor(sorted(special), dtype=torch.long)
    measured = real & (position >= leading) & ~torch.isin(ids, special_ids)
    followed = torch.zeros_like(real)
    followed[:, :-1] = real[:, 1:]
    return TokenBatch(ids, real, measured, measured & followed)

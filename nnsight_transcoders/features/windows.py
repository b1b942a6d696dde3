"""Windows of a text that hold the same tokens: told by a hash, and counted (torch only).

Text repeats itself: licences, headers, quotations. A window is the tokens around a place, cut off
where the place's context begins and ends.

Legend: n tokens of a text, m places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tables import mixed

#: Places that are hashed at a time.
_CHUNK = 2**18


def window_digests(
    tokens: Tensor, starts: Tensor, places: Tensor, before: int, width: int
) -> Tensor:
    """A hash of each window: ``(m,)`` int64, the same for windows of the same tokens.

    Args:
        tokens: ``(n,)`` ids.
        starts: ``(n_contexts + 1,)`` where each context starts, and the end.
        places: ``(m,)``.
        before: Tokens of a window before its place.
        width: Tokens of a window.
    """
    context = torch.searchsorted(starts, places, right=True)
    first, end = starts[context - 1], starts[context]
    digest = torch.zeros_like(places)
    for column in range(width):
        place = places - before + column
        inside = (place >= first) & (place < end)
        token = tokens[place.clamp(0, len(tokens) - 1)].long()
        digest = mixed(digest ^ torch.where(inside, token, -1))
    return digest


def window_counts(
    tokens: Tensor, starts: Tensor, digests: Tensor, before: int, width: int
) -> Tensor:
    """How often each window stands in a text.

    Args:
        tokens: ``(n,)`` ids.
        starts: ``(n_contexts + 1,)`` where each context starts, and the end.
        digests: Of the windows, in any shape.
        before: See ``window_digests``.
        width: See ``window_digests``.

    Returns:
        In the shape of ``digests``, int32; 0 for what is no window of the text.
    """
    known = digests.unique()
    counts = torch.zeros(len(known), dtype=torch.int32)
    for first in range(0, len(tokens), _CHUNK):
        places = torch.arange(first, min(first + _CHUNK, len(tokens)))
        found = window_digests(tokens, starts, places, before, width)
        at = torch.searchsorted(known, found).clamp_max(len(known) - 1)
        hits = at[known[at] == found]
        counts.index_add_(0, hits, torch.ones_like(hits, dtype=torch.int32))
    return counts[torch.searchsorted(known, digests)]

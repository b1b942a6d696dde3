"""Which features are active at the same positions, from sketches (torch only).

A feature's sketch has the K positions with the largest hashes of those where it is active, and the
hash is the same for all features. Above the larger of two sketches' smallest hashes both are
complete, so that part is a random sample of the positions where either is active, and the share of
it that both have estimates the overlap (Jaccard index)

    |active i and active j| / |active i or active j|

with a standard error of at most 0.5 / sqrt(sample). No pair of features is counted during the pass.
With at most K active positions each, the sketches are complete and the overlap is exact.

Legend: F features, K sketch size, M listed features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .tables import rank_in_group

#: Pairs of (feature, feature that shares a position with it) at a time.
_PAIRS = 2**22

#: Candidates per listed feature, by shared positions, whose overlap is computed.
_CANDIDATES = 4

#: Positions two features must share in their sketches: one may be chance.
_SHARED = 2


def coactive_features(keys: Tensor, top: int, *, verbose: bool = False) -> tuple[Tensor, Tensor]:
    """The features that overlap most with each.

    Args:
        keys: ``(F, K)`` sketches, negative where a slot is free.
        top: M.
        verbose: Show progress.

    Returns:
        Their numbers ``(F, M)`` int32, -1 where there are fewer, and overlaps ``(F, M)`` float32,
        largest first.
    """
    keys = keys.sort(dim=1, descending=True).values
    index = torch.full((len(keys), top), -1, dtype=torch.int32)
    overlap = torch.zeros(len(keys), top)
    feature, slot = (keys >= 0).nonzero(as_tuple=True)
    position = torch.unique(keys[feature, slot], return_inverse=True)[1]
    if not len(feature):
        return index, overlap
    members = feature[position.argsort(stable=True)]
    counts = torch.bincount(position)
    starts = counts.cumsum(0) - counts
    # The entries are by feature; so are the chunks, each with a bounded number of pairs.
    size = counts[position]
    ends = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, feature, size).cumsum(0)
    with tqdm(total=len(keys), desc="co-active", disable=not verbose, leave=False) as bar:
        first, done = 0, 0
        while first < len(keys):
            last = max(first + 1, int(torch.searchsorted(ends, done + _PAIRS, right=True)))
            mine = slice(*torch.searchsorted(feature, torch.tensor([first, last])).tolist())
            pairs = _pairs(feature[mine], starts[position[mine]], size[mine], members)
            found = _best(keys, *_shared(*pairs, len(keys), first), first, last, top)
            index[first:last], overlap[first:last] = found
            bar.update(last - first)
            done, first = int(ends[last - 1]), last
    return index, overlap


def _pairs(feature: Tensor, start: Tensor, size: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Each feature with each member of each of its positions."""
    of = torch.arange(len(feature)).repeat_interleave(size)
    within = torch.arange(len(of)) - (size.cumsum(0) - size)[of]
    return feature[of], members[start[of] + within]


def _shared(a: Tensor, b: Tensor, n: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of different features and how many sketched positions they share, if enough."""
    code, count = torch.unique((a - first) * n + b, return_counts=True)
    a, b = code // n + first, code % n
    kept = (a != b) & (count >= _SHARED)
    return a[kept], b[kept], count[kept]


def _best(
    keys: Tensor, a: Tensor, b: Tensor, count: Tensor, first: int, last: int, top: int
) -> tuple[Tensor, Tensor]:
    """The ``top`` overlaps of features ``first`` to ``last`` among the pairs that share most."""
    index = torch.full((last - first, top), -1, dtype=torch.int32)
    value = torch.zeros(last - first, top)
    order = count.argsort(descending=True, stable=True)
    order = order[a[order].argsort(stable=True)]
    order = order[rank_in_group(a[order]) < _CANDIDATES * top]
    a, b, count = a[order], b[order], count[order]
    # In parts, since each pair looks at two whole sketches.
    parts = zip(a.split(2**14), b.split(2**14), count.split(2**14), strict=True)
    jaccard = torch.cat([torch.zeros(0), *(_jaccard(keys, *part) for part in parts)])
    order = jaccard.argsort(descending=True, stable=True)
    order = order[a[order].argsort(stable=True)]
    rank = rank_in_group(a[order])
    order, rank = order[rank < top], rank[rank < top]
    index[a[order] - first, rank] = b[order].int()
    value[a[order] - first, rank] = jaccard[order]
    return index, value


def _jaccard(keys: Tensor, a: Tensor, b: Tensor, count: Tensor) -> Tensor:
    """The estimated overlap of pairs that share ``count`` sketched positions."""
    mine, others = keys[a], keys[b]
    # A sketch with a free slot is complete: its smallest "hash" is -1.
    least = torch.maximum(mine[:, -1], others[:, -1]).clamp_min(0)[:, None]
    either = (mine >= least).sum(1) + (others >= least).sum(1) - count
    return count.float() / either.float()

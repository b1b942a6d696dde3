"""The active features of a batch, and their peaks in each context (torch only).

Legend: B contexts, n active entries, S pairs of a feature and a context in which it is active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError


@dataclass(frozen=True)
class SparseActivations:
    """The active features of a batch of contexts.

    Attributes:
        context: ``(n,)`` row in the batch.
        position: ``(n,)`` position in the context.
        feature: ``(n,)`` from 0 to F - 1, all layers counted through.
        value: ``(n,)`` activations.
    """

    context: Tensor
    position: Tensor
    feature: Tensor
    value: Tensor


@dataclass(frozen=True)
class Peaks:
    """The entries of a batch, grouped by feature and context.

    Attributes:
        feature: ``(S,)``.
        value: ``(S,)`` largest activation.
        peak: ``(S,)`` where it is, in the corpus; the first of equal ones.
        first: ``(S,)`` first entry of each group.
        size: ``(S,)`` number of entries.
        place: ``(n,)`` of each entry, in the corpus.
        entry: ``(n,)`` its activation.
    """

    feature: Tensor
    value: Tensor
    peak: Tensor
    first: Tensor
    size: Tensor
    place: Tensor
    entry: Tensor

    def windows(self, chosen: Tensor, before: int, width: int) -> Tensor:
        """Activations around the peaks of some groups, as shares of the peak: ``(m, width)``."""
        out = torch.zeros(len(chosen), width, dtype=torch.float16)
        size = self.size[chosen]
        at = torch.arange(len(chosen)).repeat_interleave(size)
        within = torch.arange(len(at)) - (size.cumsum(0) - size).repeat_interleave(size)
        entry = self.first[chosen][at] + within
        column = self.place[entry] - self.peak[chosen][at] + before
        inside = (column >= 0) & (column < width)
        share = self.entry[entry] / self.value[chosen][at]
        out[at[inside], column[inside]] = share[inside].half()
        return out


def peaks_of(active: SparseActivations, place: Tensor) -> Peaks:
    n_contexts = int(active.context.max()) + 1 if len(active.context) else 1
    group = active.feature * n_contexts + active.context
    order = group.argsort(stable=True)
    groups, size = torch.unique_consecutive(group[order], return_counts=True)
    first = size.cumsum(0) - size
    place, entry = place[order], active.value[order]
    of = torch.arange(len(groups)).repeat_interleave(size)
    value = torch.zeros(len(groups)).scatter_reduce_(0, of, entry, "amax")
    at_peak = torch.where(entry == value[of], place, torch.iinfo(torch.int64).max)
    peak = torch.full((len(groups),), torch.iinfo(torch.int64).max)
    peak.scatter_reduce_(0, of, at_peak, "amin")
    return Peaks(groups // n_contexts, value, peak, first, size, place, entry)


def checked(active: SparseActivations) -> SparseActivations:
    """The entries above zero, on the CPU in float32.

    Raises:
        InputError: One is NaN or infinite.
    """
    value = active.value.detach().to("cpu", torch.float32)
    if not value.isfinite().all():
        raise InputError(
            "an activation is NaN or infinite: the model or the transcoders overflow in their "
            "dtype on this text; try bfloat16 or float32"
        )
    kept = (value > 0).nonzero().flatten()
    context, position = active.context.cpu()[kept], active.position.cpu()[kept]
    return SparseActivations(context, position, active.feature.cpu()[kept], value[kept])

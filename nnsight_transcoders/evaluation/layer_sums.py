"""Running sums of one layer over a text (torch only): what is left of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .fit_sums import FitSums


class LayerSums(FitSums):
    """Sums of one layer over a text, and how often each of its features was active.

    Args:
        d_out: Width at the output site.
        d_transcoder: Number of features.
    """

    def __init__(self, d_out: int, d_transcoder: int) -> None:
        super().__init__(d_out)
        self.fired = torch.zeros(d_transcoder, dtype=torch.long)

    def add_batch(self, n: int, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Count a batch of n positions, of which ``found`` is what ``layer_statistics`` gives."""
        error, square, total, fired = found
        self.n += n
        self.error += float(error)
        self.square += float(square)
        self.total += total
        self.fired += fired
        self.active = int(self.fired.sum())

    @property
    def mean(self) -> Tensor:
        """``(d_out,)`` mean output, in float64."""
        return self.total.div(max(self.n, 1))

    def n_dead(self) -> int:
        """Features that were never active."""
        return int((self.fired == 0).sum())

    def n_dense(self, above: float) -> int:
        """Features that were active at more than this share of the positions."""
        return int((self.fired > above * self.n).sum())

"""Running sums that give a layer's FVU and L0 without keeping its values (torch only)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError


class FitSums:
    """Running sums of one layer, in float64 on the CPU: nothing else is kept of a text.

    Args:
        width: d_model.
    """

    def __init__(self, width: int) -> None:
        self.n = 0
        self.active = 0
        self.error = 0.0
        self.square = 0.0
        self.total = torch.zeros(width, dtype=torch.float64)

    def add(self, output: Tensor, error: Tensor, active: int) -> None:
        """Outputs and errors ``(n, d_model)``, and how many features are active there in all."""
        self.n += len(output)
        self.active += active
        self.error += float(error.double().pow(2).sum())
        self.square += float(output.double().pow(2).sum())
        self.total += output.double().sum(0).cpu()

    @property
    def l0(self) -> float:
        """Active features per position."""
        return self.active / self.n

    def fvu(self) -> float:
        """Error over the variance around the mean.

        Raises:
            InputError: There is no variance.
        """
        variance = self.square - float(self.total.pow(2).sum()) / max(self.n, 1)
        if variance <= 1e-9 * self.square:
            raise InputError(
                f"the MLP's output does not vary over the {self.n} position(s) of this text, so "
                "that no FVU is defined: give a longer text"
            )
        return self.error / variance


@dataclass
class FitTotals:
    """What ``verify`` measures of a set, summed over a text.

    Attributes:
        sums: Layer -> its running sums.
        ce: Cross-entropies of the model, in nats.
        ce_replaced: The same with all layers replaced.
        ce_single: Layer -> the same with that layer alone replaced.
    """

    sums: dict[int, FitSums]
    ce: float
    ce_replaced: float
    ce_single: dict[int, float]

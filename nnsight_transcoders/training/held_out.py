"""The cross-entropy with the layers replaced, measured while training goes on.

On rows set aside at the beginning of the data. ``evaluate`` measures more, on other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnsight_transcoders.attachment.edit import attached
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites


class HeldOut:
    """Rows to measure on.

    Args:
        model: An nnsight model.
        sites: Its sites.
        rows: Batches of token ids with masks ``(rows, pos)`` of what is measured.
    """

    def __init__(self, model: Any, sites: Sites, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._model, self._sites, self._rows = model, sites, rows
        self._clean: float | None = None

    def ce_change(self, transcoders: TranscoderSet) -> dict[str, float]:
        """Cross-entropy of the next token, in nats: the model's, and its rise with all layers of
        the set replaced."""
        if self._clean is None:
            self._clean = self._cross_entropy(self._model)
        with attached(self._model, transcoders, sites=self._sites) as replaced:
            now = self._cross_entropy(replaced)
        return {"ce": self._clean, "ce_change": now - self._clean}

    def _cross_entropy(self, model: Any) -> float:
        total, count = 0.0, 0
        for ids, kept in self._rows:
            loss, n = next_token_loss(logits_of(model, ids), ids, kept)
            total, count = total + float(loss), count + n
        return total / max(count, 1)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """``(rows, pos, vocabulary)``."""
    with model.trace(ids):
        logits = model.output.logits.save()
    return logits  # noqa: RET504  (nnsight assigns it when the block ends)


def next_token_loss(logits: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the tokens after kept positions, and how many they are."""
    chosen = (kept[:, :-1] & kept[:, 1:]).to(logits.device)
    predicted, actual = logits[:, :-1][chosen].float(), ids[:, 1:].to(logits.device)[chosen]
    return F.cross_entropy(predicted, actual, reduction="sum"), len(actual)

"""The numbers of ``evaluate`` once more: torch hooks, one text at a time, sums written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attach_support import Reference, hf_copy
from torch import Tensor

from nnsight_transcoders.sets import TranscoderSet

#: Token ids with specials (0 to 2 in the zoo's tokenizer) in between, of unequal lengths.
TEXTS = [
    [1, 5, 9, 33, 12, 50, 7, 61, 2, 14],
    [1, 77, 5, 41],
    [8, 1, 19, 20, 21, 22, 23, 24, 25, 26, 90, 3],
    [1, 4],
    [60, 61, 62, 63, 64, 65],
]
SPECIAL = (0, 1, 2)


def positions(leading: int, texts: list[list[int]] = TEXTS) -> list[list[int]]:
    """Per text, where features are counted."""
    return [
        [t for t, token in enumerate(text) if token not in SPECIAL and t >= leading]
        for text in texts
    ]


class ByHand:
    """What ``evaluate`` should find for a set on ``TEXTS``."""

    def __init__(self, name: str, chosen: TranscoderSet, leading: int = 0) -> None:
        self.name, self.chosen, self.leading = name, chosen, leading
        self.where = positions(leading)
        self.sites = [self._observed(torch.tensor(text)) for text in TEXTS]
        self.own = [self._own(text) for text in TEXTS]

    def _observed(self, ids: Tensor) -> Reference:
        reference = Reference(
            self.name, self.chosen, outputs=dict.fromkeys(self.chosen.layers, lambda y, _: y)
        )
        reference.output(ids)
        return reference

    def _own(self, text: list[int]) -> Tensor:
        with torch.no_grad():
            return hf_copy(self.name)(torch.tensor([text])).logits[0]

    def values(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, reconstructions and features at all measured positions."""
        rows: tuple[list[Tensor], ...] = ([], [], [])
        for reference, where in zip(self.sites, self.where, strict=True):
            made = reference.reconstruction(layer).detach()
            parts = (reference.y[layer], made, reference.features[layer])
            for kept, part in zip(rows, parts, strict=True):
                kept.append(part[where].detach())
        y, made, features = (torch.cat(part) for part in rows)
        return y, made, features

    def fvu(self, layer: int) -> float:
        y, made, _ = self.values(layer)
        return float((y - made).pow(2).sum() / (y - y.mean(0)).pow(2).sum())

    def predictions(self, write: Callable[[int, Tensor, Tensor], Tensor]) -> list[float]:
        """CE, KL and agreement with ``write(layer, mlp's own output, reconstruction)`` in place."""

        def outputs(layer: int) -> Any:
            def edit(y: Tensor, made: Tensor) -> Tensor:
                return torch.cat([y[: self.leading], write(layer, y, made)[self.leading :]])

            return edit

        losses, divergences, agreements = [], [], []
        for text, where, own in zip(TEXTS, self.where, self.own, strict=True):
            # A feature at a position that the set leaves out writes nothing to later layers either.
            off = dict.fromkeys(self.chosen.layers, self._off)
            edits = {layer: outputs(layer) for layer in self.chosen.layers}
            logits = Reference(self.name, self.chosen, off, edits).output(torch.tensor(text))[0]
            found, expected = logits.double().log_softmax(-1), own.double().log_softmax(-1)
            for t in where:
                if t + 1 < len(text):
                    losses.append(-found[t, text[t + 1]])
                    divergences.append((expected[t].exp() * (expected[t] - found[t])).sum())
                    agreements.append((found[t].argmax() == expected[t].argmax()).double())
        return [float(torch.stack(part).mean()) for part in (losses, divergences, agreements)]

    def _off(self, acts: Tensor) -> Tensor:
        acts = acts.clone()
        acts[: self.leading] = 0
        return acts

    def mean(self, layer: int) -> Tensor:
        return self.values(layer)[0].mean(0)

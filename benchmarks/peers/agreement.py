"""How far two graphs of one case agree: ``ours.py``'s and ``theirs.py``'s tables, torch only.

What is compared is what both define. circuit-tracer sets the error nodes of position 0 to zero,
where this package keeps them; those columns are left out (docs/peers.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tables = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest difference of two tensors.

    Attributes:
        largest: In absolute size.
        relative: Over the largest magnitude of theirs.
    """

    largest: float
    relative: float

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> Difference:
        """Of two tensors of one shape."""
        largest = float((ours - theirs).abs().max()) if ours.numel() else 0.0
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        return cls(largest, largest / scale if scale else largest)

    def __str__(self) -> str:
        return f"{self.largest:.1e} ({self.relative:.1e})"


@dataclass(frozen=True)
class Agreement:
    """What ``compare`` found.

    Attributes:
        features: Number of feature nodes of ours and of theirs, and of both.
        same_logits: Whether the targets are the same tokens.
        activation: Of the common features.
        probability: Of the targets.
        error: Error vectors at positions from 1 on.
        adjacency: All entries between common nodes.
        worst_row: The largest difference of an entry over the largest entry of *its own row*.
        entries: How many entries were compared.
    """

    features: tuple[int, int, int]
    same_logits: bool
    activation: Difference
    probability: Difference
    error: Difference
    adjacency: Difference
    worst_row: float
    entries: int

    @property
    def same_features(self) -> bool:
        """Whether both have the same features."""
        return len(set(self.features)) == 1


def compare(ours: Tables, theirs: Tables) -> Agreement:
    """Match the nodes of both graphs and compare all that hangs on them."""
    selected = theirs["selected"]
    names = [
        list(map(tuple, table.tolist())) for table in (ours["active"], theirs["active"][selected])
    ]
    place = {name: row for row, name in enumerate(names[1])}
    common = [(row, place[name]) for row, name in enumerate(names[0]) if name in place]
    mine, other = (torch.tensor(rows, dtype=torch.long) for rows in zip(*common, strict=True))
    n_layers, n_positions, _ = ours["error"].shape
    # Errors from position 1 on, tokens, logits: in both they follow the features in this order.
    later = torch.arange(n_layers * n_positions + n_positions + len(ours["logits"]))
    defined = (later >= n_layers * n_positions) | (later % n_positions > 0)
    later = later[defined]
    nodes = (
        torch.cat([mine, len(names[0]) + later]),
        torch.cat([other, len(names[1]) + later]),
    )
    blocks = [
        tables["adjacency"][index[:, None], index]
        for tables, index in zip((ours, theirs), nodes, strict=True)
    ]
    row_scale = blocks[1].abs().amax(1)
    rows = row_scale > 0
    worst = (blocks[0] - blocks[1]).abs().amax(1)[rows] / row_scale[rows]
    return Agreement(
        features=(len(names[0]), len(names[1]), len(common)),
        same_logits=torch.equal(ours["logits"], theirs["logits"]),
        activation=Difference.of(ours["activation"][mine], theirs["activation"][selected][other]),
        probability=Difference.of(ours["probability"], theirs["probability"]),
        error=Difference.of(ours["error"][:, 1:], theirs["error"][:, 1:]),
        adjacency=Difference.of(*blocks),
        worst_row=float(worst.max()),
        entries=blocks[0].numel(),
    )

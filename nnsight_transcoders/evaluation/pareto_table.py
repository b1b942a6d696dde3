"""A sweep over sparsity as a table, as JSON and as curves (no torch, no model)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import log
from typing import Any

from nnsight_transcoders.errors import InputError

from .json_file import JsonFile
from .report import as_text


@dataclass(frozen=True)
class ParetoPoint:
    """One trained dictionary in one layer, measured on held-out text.

    Attributes:
        kind: What it is, such as ``"transcoder"`` or ``"SAE"``.
        layer: Whose MLP it replaces.
        setting: What was swept: key of ``TrainConfig`` -> value.
        l0: Active features per position.
        ce: Cross-entropy of the next token with this layer replaced, in nats.
        fvu: Fraction of variance unexplained.
        kl: KL(model || replaced model), in nats.
        top1: Share of the predictions whose most likely token stays the same.
        dead: Features that were never active.
    """

    kind: str
    layer: int
    setting: dict[str, Any]
    l0: float
    ce: float
    fvu: float
    kl: float
    top1: float
    dead: int


@dataclass(frozen=True)
class Bounds:
    """What one layer's points lie between.

    Attributes:
        ce: Cross-entropy of the model itself, in nats.
        ce_mean: With the layer's MLP output replaced by its mean over the held-out text.
        ce_zero: With it replaced by zero.
    """

    ce: float
    ce_mean: float
    ce_zero: float


@dataclass(frozen=True, repr=False)
class ParetoTable(JsonFile):
    """What ``pareto`` found; printing it shows the table.

    Attributes:
        model: The model's name.
        n_predictions: Predictions of the held-out text that were measured.
        config: The training configuration that all points share, JSON-ready.
        bounds: Layer -> what its points lie between.
        points: The points, by layer, kind and L0.
    """

    model: str
    n_predictions: int
    config: dict[str, Any]
    bounds: dict[int, Bounds]
    points: tuple[ParetoPoint, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return tuple(sorted(self.bounds))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds, in the order of the sweep."""
        return tuple(dict.fromkeys(point.kind for point in self.points))

    def curve(self, kind: str, layer: int) -> list[ParetoPoint]:
        """The points of one kind and layer that no other of them beats, by rising L0.

        A point is left out where another one of the same kind has as low a cross-entropy at as low
        an L0.
        """
        found = [point for point in self.points if (point.kind, point.layer) == (kind, layer)]
        if not found:
            raise InputError(
                f"no points of {kind!r} in layer {layer}; there are {', '.join(self.kinds)} in "
                f"layers {list(self.layers)}"
            )
        kept: list[ParetoPoint] = []
        for point in sorted(found, key=lambda one: (one.l0, one.ce)):
            if not kept or point.ce < kept[-1].ce:
                kept.append(point)
        return kept

    def margin(
        self,
        layer: int,
        better: str = "transcoder",
        worse: str = "SAE",
        *,
        from_l0: float = 0.0,
    ) -> float:
        """By how much the cross-entropy of one kind's curve lies below another's, in nats.

        Between the points the curves are straight in log L0; beyond its ends, by up to a twentieth,
        a curve stays level.

        Args:
            layer: Which layer.
            better: The kind whose curve should lie below.
            worse: The other kind.
            from_l0: Leave out what is sparser.

        Returns:
            The least margin over the range of L0 that both cover; negative where the first one's
                curve lies above.

        Raises:
            InputError: The two curves have no range of L0 in common.
        """
        first, second = (self.curve(kind, layer) for kind in (better, worse))
        low = max(first[0].l0, second[0].l0, from_l0)
        high = min(first[-1].l0, second[-1].l0)
        # Straight pieces: the least difference is at a point of one of the two curves.
        at = [low, high, *(p.l0 for p in (*first, *second) if low < p.l0 < high)]
        if low > 1.05 * high:
            raise InputError(f"the curves of layer {layer} have no range of L0 in common")
        return min(_height(second, l0) - _height(first, l0) for l0 in at)

    # -- JSON ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParetoTable:
        """Read ``to_dict``'s output.

        Raises:
            InputError: Not that.
        """
        try:
            given = {f.name: data[f.name] for f in fields(cls)}
            given["bounds"] = {int(n): Bounds(**one) for n, one in data["bounds"].items()}
            given["points"] = tuple(ParetoPoint(**one) for one in data["points"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"this is no stored ParetoTable: {error!r}") from error
        return cls(**given)

    # -- table -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        from rich.box import SIMPLE
        from rich.table import Column, Table

        names = ("L0", "CE", "CE change", "FVU", "KL", "top-1", "dead")
        columns = [Column(name, justify="right", no_wrap=True) for name in names]
        table = Table("layer", "kind", "setting", *columns, box=SIMPLE, pad_edge=False)
        for layer in self.layers:
            own = self.bounds[layer]
            table.add_section()
            for name, ce in (("model", own.ce), ("mean", own.ce_mean), ("zero", own.ce_zero)):
                table.add_row(str(layer), name, "", "", f"{ce:.4f}", f"{ce - own.ce:+.4f}")
            for one in (point for point in self.points if point.layer == layer):
                setting = " ".join(f"{key}={value:g}" for key, value in one.setting.items())
                numbers = (f"{one.l0:.1f}", f"{one.ce:.4f}", f"{one.ce - own.ce:+.4f}")
                rest = (f"{one.fvu:.4f}", f"{one.kl:.4f}", f"{one.top1:.1%}", str(one.dead))
                table.add_row(str(layer), one.kind, setting, *numbers, *rest)
        return as_text(table)

    __repr__ = __str__


def _height(curve: list[ParetoPoint], l0: float) -> float:
    """A curve's cross-entropy at an L0, level beyond its ends."""
    if l0 <= curve[0].l0:
        return curve[0].ce
    for left, right in pairwise(curve):
        if l0 <= right.l0:
            share = log(l0 / left.l0) / log(right.l0 / left.l0)
            return left.ce + share * (right.ce - left.ce)
    return curve[-1].ce

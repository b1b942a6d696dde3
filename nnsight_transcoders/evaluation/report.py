"""What ``evaluate`` found, as values, as a table and as JSON (no torch, no model)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from nnsight_transcoders.errors import InputError

from .json_file import JsonFile

if TYPE_CHECKING:
    from rich.table import Table

#: Wider than any table, which takes what its columns need.
WIDTH = 200


@dataclass(frozen=True)
class ReplacementEffect:
    """What it does to a model's predictions to replace MLPs by their reconstructions.

    Attributes:
        ce_change: Rise of the next token's cross-entropy, in nats.
        kl: KL(model || replaced model), in nats per prediction.
        top1: Share of the predictions whose most likely token stays the same.
        ce_change_zero: Rise of the cross-entropy when the same outputs are replaced by zero.
        ce_change_mean: The same, when they are replaced by their mean over the text.
    """

    ce_change: float
    kl: float
    top1: float
    ce_change_zero: float
    ce_change_mean: float

    @property
    def recovered_zero(self) -> float | None:
        """``(CE_zero - CE_replaced) / (CE_zero - CE_model)``: 1 is as good as the MLP, 0 as bad as
        none. None where zero ablation costs nothing, so that there is nothing to recover."""
        return _recovered(self.ce_change, self.ce_change_zero)

    @property
    def recovered_mean(self) -> float | None:
        """The same against mean ablation."""
        return _recovered(self.ce_change, self.ce_change_mean)


def _recovered(change: float, ablated: float) -> float | None:
    return (ablated - change) / ablated if ablated > 0 else None


@dataclass(frozen=True)
class LayerEvaluation:
    """One layer's transcoder on the model's own activations.

    Attributes:
        layer: Which layer.
        d_transcoder: Number of features.
        l0: Active features per position.
        fvu: ``sum |y - y_hat|^2 / sum |y - mean y|^2``, y the MLP's output.
        dead: Features that are not active at any position.
        dense: Features that are active at more than ``dense_above`` of the positions.
        alone: What replacing this layer alone does; None if that was not measured.
    """

    layer: int
    d_transcoder: int
    l0: float
    fvu: float
    dead: int
    dense: int
    alone: ReplacementEffect | None


@dataclass(frozen=True, repr=False)
class Evaluation(JsonFile):
    """What ``evaluate`` found; printing it shows the table.

    Attributes:
        model: The model's name.
        transcoders: The set.
        n_tokens: Positions at which features were counted.
        n_predictions: Positions whose next token was predicted.
        ce: Cross-entropy of the model itself, in nats per prediction.
        dense_above: Share of positions above which an active feature counts as dense.
        layers: Layer by layer.
        together: What replacing all layers of the set at once does.
        baseline: The same for the set that was measured beside this one, on the same positions.
    """

    model: str
    transcoders: str
    n_tokens: int
    n_predictions: int
    ce: float
    dense_above: float
    layers: tuple[LayerEvaluation, ...]
    together: ReplacementEffect
    baseline: Evaluation | None = None

    @property
    def l0(self) -> float:
        """Mean of the layers' L0."""
        return sum(layer.l0 for layer in self.layers) / len(self.layers)

    @property
    def ce_replaced(self) -> float:
        """Cross-entropy with all layers replaced, in nats."""
        return self.ce + self.together.ce_change

    # -- JSON ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it back. Holds the derived numbers as well."""
        data = asdict(self) | {"l0": self.l0, "ce_replaced": self.ce_replaced}
        data["layers"] = [
            asdict(one) | {"alone": None if one.alone is None else _effect_dict(one.alone)}
            for one in self.layers
        ]
        data["together"] = _effect_dict(self.together)
        data["baseline"] = None if self.baseline is None else self.baseline.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read ``to_dict``'s output.

        Raises:
            InputError: Not that.
        """
        try:
            given = {f.name: data[f.name] for f in fields(cls)}
            given["layers"] = tuple(
                LayerEvaluation(
                    **{f.name: one[f.name] for f in fields(LayerEvaluation) if f.name != "alone"},
                    alone=None if one["alone"] is None else _effect(one["alone"]),
                )
                for one in data["layers"]
            )
            given["together"] = _effect(data["together"])
            baseline = data["baseline"]
            given["baseline"] = None if baseline is None else cls.from_dict(baseline)
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no stored Evaluation: {error!r}") from error
        return cls(**given)

    # -- tables ----------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [
            f"{self.n_tokens} tokens, {self.n_predictions} predictions, cross-entropy of the model "
            f"{self.ce:.4f} nats"
        ]
        for one in (self, self.baseline):
            if one is not None:
                name = f"baseline: {one.transcoders}" if one is self.baseline else one.transcoders
                lines += [name, as_text(one._table())]
        return "\n".join(lines)

    __repr__ = __str__

    def _table(self) -> Table:
        from rich.box import SIMPLE
        from rich.table import Column, Table

        names = (
            "layer",
            "L0",
            "FVU",
            "dead",
            f">{self.dense_above:.0%}",
            "CE change",
            "KL",
            "top-1",
        )
        ablations = ("CE zero", "CE mean", "rec. zero", "rec. mean")
        columns = (Column(name, justify="right", no_wrap=True) for name in (*names, *ablations))
        table = Table(*columns, box=SIMPLE, pad_edge=False)
        for one in self.layers:
            features = (f"{one.l0:.1f}", f"{one.fvu:.4f}", str(one.dead), str(one.dense))
            table.add_row(str(one.layer), *features, *_cells(one.alone))
        if len(self.layers) > 1:
            dead, dense = (sum(getattr(x, k) for x in self.layers) for k in ("dead", "dense"))
            mean = sum(one.fvu for one in self.layers) / len(self.layers)
            features = (f"{self.l0:.1f}", f"{mean:.4f}", str(dead), str(dense))
            table.add_section()
            table.add_row("all", *features, *_cells(self.together))
        return table


def as_text(table: Table) -> str:
    """A table as plain text, of one width wherever it is printed."""
    from rich.console import Console

    # force_jupyter: in a notebook it would show an empty output besides.
    console = Console(
        width=WIDTH, force_jupyter=False, highlight=False, color_system=None, legacy_windows=False
    )
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _cells(effect: ReplacementEffect | None) -> tuple[str, ...]:
    if effect is None:
        return ("-",) * 7
    changes = (effect.ce_change, effect.ce_change_zero, effect.ce_change_mean)
    rise, zero, mean = (f"{change:+.4f}" for change in changes)
    shares = (effect.recovered_zero, effect.recovered_mean)
    recovered = ("-" if share is None else f"{share:.1%}" for share in shares)
    return (rise, f"{effect.kl:.4f}", f"{effect.top1:.1%}", zero, mean, *recovered)


def _effect_dict(effect: ReplacementEffect) -> dict[str, float | None]:
    derived = {name: getattr(effect, name) for name in ("recovered_zero", "recovered_mean")}
    return {**asdict(effect), **derived}


def _effect(data: Mapping[str, Any]) -> ReplacementEffect:
    return ReplacementEffect(**{f.name: data[f.name] for f in fields(ReplacementEffect)})

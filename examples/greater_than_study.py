"""What ``greater_than.py`` measures: prompts, units, rankings and curves.

Legend: n prompts, T positions, U units (features or neurons) of a layer, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from nnsight_transcoders import (
    AttributionGraph,
    CircuitRun,
    TranscoderSet,
    attach,
    attribute,
    resolve_sites,
)
from nnsight_transcoders.circuits.graph import FEATURE, LOGIT
from nnsight_transcoders.circuits.model_weights import linear_weight
from nnsight_transcoders.errors import InputError

AIM = 0.9
"""The share of the original probability difference that has to be recovered."""
KEEP = (*range(0, 8), *range(8, 32, 2), *range(32, 64, 4), *range(64, 129, 16), 192, 256, 384, 512)
"""How many units per layer are kept."""
STEPS = 8
"""Steps from no unit to all of them over which contributions are averaged."""
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2")
Scores = dict[int, Tensor]


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length that differ in their first year.

    Attributes:
        ids: ``(n, T)``.
        starts: The n first years, without their century.
        years: ``(100,)`` ids of the two-digit tokens.
    """

    ids: Tensor
    starts: tuple[int, ...]
    years: Tensor

    def metric(self, logits: Tensor) -> Tensor:
        """``sum_{y' > y} p - sum_{y' <= y} p`` of logits ``(n, V)``, with the softmax over the
        hundred two-digit tokens: ``(n,)``."""
        p = logits[:, self.years].softmax(-1)
        later = torch.arange(100) > torch.tensor(self.starts)[:, None]
        return torch.where(later.to(p.device), p, -p).sum(-1)


def make_prompts(tokenizer: Any, noun: str, century: int, starts: Sequence[int]) -> Prompts:
    """Build the prompts, and leave out years that are not two tokens of their own."""
    years = [tokenizer(f"{y:02d}", add_special_tokens=False)["input_ids"] for y in range(100)]
    if any(len(ids) != 1 for ids in years):
        raise InputError("this tokenizer has no tokens for all two-digit numbers")
    found: dict[int, list[int]] = {}
    for y in starts:
        ids = tokenizer(f"The {noun} lasted from {century}{y:02d} to {century}")["input_ids"]
        if ids.count(years[y][0]) >= 1 and ids[-1] in ids[:-1]:  # the century is a token, twice
            found[y] = ids
    if not found:
        raise InputError(f"{noun!r} and century {century} make no usable prompt")
    length, _ = Counter(map(len, found.values())).most_common(1)[0]
    kept = {y: ids for y, ids in found.items() if len(ids) == length}
    flat = torch.tensor([ids[0] for ids in years])
    return Prompts(torch.tensor(list(kept.values())), tuple(kept), flat)


# -- features and neurons, treated alike -----------------------------------------------------------


class Units:
    """The features, or the neurons, of some layers.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        layers: Which layers.
        neurons: Whether to take the neurons of the MLPs and not the features of the transcoders.
        last_only: Whether other positions than the last one are left alone.
    """

    def __init__(
        self,
        model: Any,
        transcoders: TranscoderSet,
        layers: Sequence[int],
        *,
        neurons: bool,
        last_only: bool,
    ) -> None:
        self.name = "neurons" if neurons else "features"
        self.model = model if neurons else attach(model, transcoders, layers)
        self.layers, self.neurons, self.set = tuple(layers), neurons, transcoders
        sites, self._down = resolve_sites(model), {}
        for layer in layers:
            mlp = sites.layers[layer].mlp
            names = [n for n in _DOWN if hasattr(model._module.get_submodule(mlp), n)]
            if not names and neurons:
                raise InputError(f"{mlp} has no neurons that are known by name")
            self._down[layer] = f"{mlp}.{names[0]}" if names else mlp
        first = max(transcoders.config(layer).leading_positions for layer in layers)
        self.where = slice(-1, None) if last_only else slice(first, None)

    def read(self, layer: int) -> Tensor:
        """Inside a trace: activations ``(n, T, U)``."""
        if self.neurons:  # act(gate) * up where the MLP is gated, act(up) where not
            return self.model.get(self._down[layer]).input
        return self.model.transcoders[layer].features.output

    def write(self, layer: int, values: Tensor) -> None:
        """Inside a trace: other activations."""
        if self.neurons:
            self.model.get(self._down[layer]).input = values
        else:
            self.model.transcoders[layer].features.output = values

    def rows(self, layer: int) -> Tensor:
        """What each neuron writes ``(U, D)``."""
        part = self.model._module.get_submodule(self._down[layer])
        return linear_weight(part, getattr(part, "in_features", 0), torch.float32)[0].T

    def run(self, prompts: Prompts, kept: Mapping[int, Tensor]) -> float:
        """The mean metric when all units but ``kept`` (numbers per layer) are set to zero."""
        with torch.no_grad():
            with self.model.trace(prompts.ids):
                for layer in self.layers:
                    values = self.read(layer).clone()
                    here = values[:, self.where]
                    mask = torch.zeros_like(here[:1, :1]).index_fill(-1, kept[layer], 1.0)
                    values[:, self.where] = here * mask
                    self.write(layer, values)
                logits = nnsight.save(self.model.output.logits[:, -1])
        return float(prompts.metric(logits).mean())

    def activations(self, prompts: Prompts) -> Scores:
        """Per layer, activations ``(n, T, U)``."""
        with torch.no_grad():
            with self.model.trace(prompts.ids):
                acts = nnsight.save([self.read(layer).clone() for layer in self.layers])
        return dict(zip(self.layers, acts, strict=True))

    def slopes(self, prompts: Prompts, level: float) -> Scores:
        """Per layer, the metric's slope ``(n, U)`` in a factor on each unit, at that factor."""
        with self.model.trace(prompts.ids):
            gates = []
            for layer in self.layers:
                values = self.read(layer)
                gate = torch.full_like(values[:, :1], level).requires_grad_()
                gated = values.clone()
                gated[:, self.where] = values[:, self.where] * gate
                self.write(layer, gated)
                gates.append(gate)
            metric = prompts.metric(self.model.output.logits[:, -1]).sum()
            found = nnsight.save([g[:, 0] for g in torch.autograd.grad(metric, gates)])
        return dict(zip(self.layers, found, strict=True))

    def contributions(self, prompts: Prompts) -> Scores:
        """Per layer, each unit's share ``(n, U)`` of the difference that all units make together.

        The slopes, averaged from all units at zero to all at their own value (integrated
        gradients; Sundararajan, Taly, Yan 2017): they sum to that difference.
        """
        total: Scores = {}
        for step in range(STEPS):
            for layer, slope in self.slopes(prompts, (step + 0.5) / STEPS).items():
                total[layer] = total.get(layer, 0.0) + slope / STEPS
        return total


# -- rankings ------------------------------------------------------------------------------------


def rankings(units: Units, prompts: Prompts, circuits: Sequence[CircuitRun]) -> dict[str, Scores]:
    """Name -> layer -> a score per unit ``(U,)``; ``circuits`` are runs of some of the prompts.

    ``contribution`` is the mean over the prompts of ``Units.contributions``, ``magnitude`` the mean
    of its magnitude; ``gradient`` is the mean magnitude of activation times gradient, and
    ``mean gradient`` the magnitude of its mean. ``direct`` (what a unit writes at the last
    position, times the direction of the later years) and ``path`` (the same along all paths of the
    attribution graph; features only) are of the frozen model.
    """
    acts, shares = units.activations(prompts), units.contributions(prompts)
    slopes = units.slopes(prompts, 1.0)
    found = {
        "contribution": {i: share.mean(0) for i, share in shares.items()},
        "magnitude": {i: share.abs().mean(0) for i, share in shares.items()},
        "gradient": {i: slope.abs().mean(0) for i, slope in slopes.items()},
        "mean gradient": {i: slope.mean(0).abs() for i, slope in slopes.items()},
        "variance": {i: a[:, units.where].var(0).sum(0) for i, a in acts.items()},
    }
    return found | _frozen_rankings(units, prompts, acts, circuits) if circuits else found


def _frozen_rankings(
    units: Units, prompts: Prompts, acts: Scores, circuits: Sequence[CircuitRun]
) -> dict[str, Scores]:
    names = ("direct",) if units.neurons else ("direct", "path")
    found = {n: {i: torch.zeros(acts[i].shape[-1]) for i in units.layers} for n in names}
    direct = found["direct"]
    for circuit in circuits:
        row = prompts.ids.tolist().index(circuit.run.token_ids.tolist())
        name, direction = _later_years(circuit, prompts, prompts.starts[row])
        target = circuit.token((name, direction))
        if units.neurons:
            at = torch.full((1,), target.position)
            for layer in units.layers:
                rows = circuit.frozen.to_stream(layer, units.rows(layer), at)
                direct[layer] += (acts[layer][row, -1] * (rows @ target.vector)).abs()
            continue
        for one in circuit.contributions(target):
            if one.kind == "feature" and one.layer in direct:
                direct[one.layer][one.index] += abs(one.value)
        ids, targets = circuit.run.token_ids, [(name, direction)]
        graph = attribute(circuit.model, units.set, ids, targets=targets)
        _add_paths(found["path"], graph, range(circuit.run.n_positions)[units.where])
    return found


def _later_years(circuit: CircuitRun, prompts: Prompts, y: int) -> tuple[str, Tensor]:
    """The direction from the mean of the earlier years' logits to that of the later ones."""
    part = circuit.model._module.get_submodule(circuit.sites.unembed)
    rows = linear_weight(part, circuit.sites.d_model, torch.float32)[0][prompts.years]
    return "later years", rows[y + 1 :].mean(0) - rows[: y + 1].mean(0)


def _add_paths(scores: Scores, graph: AttributionGraph, positions: Sequence[int]) -> None:
    """Add what each feature sends to the graph's target along all paths, to its scores."""
    features = graph.kind == FEATURE
    slopes = torch.where(features, 1 / graph.value, 1.0)[:, None] * graph.adjacency()
    step = (graph.kind == LOGIT).to(slopes.dtype)
    total = torch.zeros_like(step)
    while (step := step @ slopes).any():
        total += step
    flow = {layer: torch.zeros_like(score) for layer, score in scores.items()}
    for number in features.nonzero().flatten().tolist():
        node = graph.node(number)
        if node.layer in flow and node.position in positions:
            flow[node.layer][node.index] += total[number]
    for layer in scores:
        scores[layer] += flow[layer].abs()


# -- the study ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """How the metric recovers with the number of units kept per layer.

    Attributes:
        units: ``"features"`` or ``"neurons"``.
        ranking: By what they were chosen.
        points: ``(units kept per layer, metric)``.
    """

    units: str
    ranking: str
    points: tuple[tuple[int, float], ...]

    def needed(self, aim: float) -> int | None:
        """The fewest units per layer from which on the metric stays at ``aim`` or above."""
        best = None
        for k, value in reversed(self.points):
            if value < aim:
                break
            best = k
        return best


@dataclass(frozen=True)
class Study:
    """Everything that is printed and written; ``years`` has one entry per feature shown."""

    original: float
    replaced: float
    layers: tuple[int, ...]
    curves: tuple[Curve, ...]
    starts: tuple[int, ...]
    years: tuple[dict[str, Any], ...]

    @property
    def aim(self) -> float:
        """The probability difference that has to be recovered."""
        return AIM * self.original

    def best(self, units: str) -> Curve:
        """The curve of the ranking by which the fewest of these units are needed."""
        mine = [curve for curve in self.curves if curve.units == units]
        return min(mine, key=lambda curve: curve.needed(self.aim) or curve.points[-1][0] + 1)

    def fewest(self, units: str) -> int | None:
        """Units per layer that recover ``AIM``, by the best ranking; None if none does."""
        return self.best(units).needed(self.aim)


def run_study(
    model: Any,
    transcoders: TranscoderSet,
    prompts: Prompts,
    *,
    layers: Sequence[int],
    last_only: bool = False,
    keep: Sequence[int] = KEEP,
    n_circuits: int = 16,
    n_years: int = 8,
) -> Study:
    """Run the whole study.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        prompts: From ``make_prompts``.
        layers: Whose MLPs are replaced, and whose neurons are removed.
        last_only: Whether only the last position is touched.
        keep: How many units per layer are kept.
        n_circuits: On how many prompts direct and path contributions are computed; 0: not at all.
        n_years: For how many features the activation over the years is kept.
    """
    circuits, curves = [], []
    if n_circuits:
        step = max(1, len(prompts.ids) // n_circuits)
        circuits = [CircuitRun.collect(model, transcoders, ids) for ids in prompts.ids[::step]]
    levels, years = {}, ()
    for is_neurons in (False, True):
        units = Units(model, transcoders, layers, neurons=is_neurons, last_only=last_only)
        scores = rankings(units, prompts, circuits)
        curves += [_curve(units, prompts, name, score, keep) for name, score in scores.items()]
        levels[units.name] = curves[-1].points[-1][1]  # with all units kept
        if not is_neurons:
            years = tuple(year_curves(units, prompts, scores["contribution"], n_years))
    return Study(
        levels["neurons"], levels["features"], tuple(layers), tuple(curves), prompts.starts, years
    )


def _curve(
    units: Units, prompts: Prompts, ranking: str, scores: Scores, keep: Sequence[int]
) -> Curve:
    order = {layer: score.argsort(descending=True) for layer, score in scores.items()}
    widest = max(map(len, order.values()))
    points = [
        (k, units.run(prompts, {layer: o[:k] for layer, o in order.items()}))
        for k in sorted({min(k, widest) for k in (*keep, widest)})
    ]
    return Curve(units.name, ranking, tuple(points))


def year_curves(units: Units, prompts: Prompts, scores: Scores, n: int) -> list[dict[str, Any]]:
    """Activation over the first years of the ``n`` features with the largest scores, at the
    position where it varies most."""
    acts = units.activations(prompts)
    flat = [(float(s), layer, i) for layer in units.layers for i, s in enumerate(scores[layer])]
    found = []
    for score, layer, index in sorted(flat, reverse=True)[:n]:
        values = acts[layer][..., index]
        at = int(values.var(0).argmax())
        found.append(
            {
                "layer": layer,
                "feature": index,
                "position": at,
                "contribution": score,
                "activation": values[:, at].tolist(),
            }
        )
    return found

"""``pareto``: the paper's comparison of transcoders with sparse autoencoders, on any model.

Dictionaries of each kind are trained over a range of sparsity on the same activations with the same
budget, and the cross-entropy that replacing the MLP by each of them costs is set against its L0
(Dunefsky, Chlenski, Nanda 2024, section 3.2). A sparse autoencoder here reads the MLP's *output*
and writes it back, so it has less to do: it need not compute what the MLP computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sites import Sites, resolve_sites
from nnsight_transcoders.training.config import TrainConfig
from nnsight_transcoders.training.trainer import train

from .measuring import evaluate
from .pareto_table import Bounds, ParetoPoint, ParetoTable
from .report import Evaluation
from .token_batches import default_context, token_pieces

#: What is swept when nothing else is asked for (ReLU and JumpReLU need ``sparsity_weight``).
SWEEP: Mapping[str, Sequence[Any]] = {"k": (4, 8, 16, 32, 64)}
_AGAIN = "give the training data as a list, a file or a data set"


@dataclass(frozen=True)
class _Run:
    """One training run of the sweep."""

    kind: str
    setting: dict[str, Any]
    config: TrainConfig

    def folder(self, out: Path | None) -> Path | None:
        name = ",".join(f"{key}={value}" for key, value in self.setting.items())
        return None if out is None else out / self.kind.replace(" ", "-") / name


def pareto(
    model: Any,
    layers: int | Sequence[int],
    data: Any,
    held_out: Any,
    *,
    config: TrainConfig | Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    kinds: Mapping[str, Mapping[str, Any]] | None = None,
    max_tokens: int | None = 65_536,
    batch_size: int = 8,
    out: str | Path | None = None,
    sites: Sites | None = None,
    verbose: bool = True,
) -> ParetoTable:
    """Train transcoders and SAEs over a range of sparsity, and measure each on held-out text.

    Args:
        model: An nnsight model.
        layers: Which MLP is replaced, or several, each on its own, all trained in one run.
        data: Text to train on, as ``train`` takes it, read once per run.
        held_out: Other text to measure on, as ``evaluate`` takes it.
        config: What all runs share (see ``TrainConfig``). With ``cache`` the model runs over the
            data once per kind and not once per run.
        sweep: Keys of the config -> values to try, in every combination (default: ``SWEEP``).
        kinds: Name of each kind -> what its config changes (default: a transcoder and an SAE).
        max_tokens: Tokens of the held-out text that are used; None: all.
        batch_size: Pieces of it that run at once.
        out: Folder for the sets and ``pareto.json``; a sweep that was stopped goes on there.
        sites: The model's sites, where they have to be given by hand.
        verbose: Show progress.

    Raises:
        ConfigError: A key or value that ``TrainConfig`` does not take.
        InputError: Layers that do not exist, an empty sweep, or data that can be read only once.
    """
    sites = sites or resolve_sites(hf_module(model))
    shared = config if isinstance(config, TrainConfig) else TrainConfig.from_dict(config or {})
    shared = shared.replace(layers=(layers,) if isinstance(layers, int) else tuple(layers))
    runs = _runs(shared, sweep, kinds)
    if isinstance(data, Iterator) and len(runs) > 1:
        raise InputError(f"an iterator can be read once, but there are {len(runs)} runs: {_AGAIN}")
    length = default_context(sites)
    text = token_pieces(model, held_out, sites, context=length, max_tokens=max_tokens)
    folder = None if out is None else Path(out)
    reports = [
        evaluate(
            model,
            train(model, data, run.config, out=run.folder(folder), sites=sites, verbose=verbose),
            text,
            batch_size=batch_size,
            max_tokens=None,
            sites=sites,
        )
        for run in tqdm(runs, desc="pareto", disable=not verbose)
    ]
    table = _table(shared, runs, reports)
    if folder is not None:
        table.save(folder / "pareto.json")
    return table


def _runs(
    shared: TrainConfig,
    sweep: Mapping[str, Sequence[Any]] | None,
    kinds: Mapping[str, Mapping[str, Any]] | None,
) -> list[_Run]:
    """Every kind in every setting; the configs are checked here, before anything is trained."""
    if sweep is None:
        if shared.activation in ("relu", "jumprelu"):
            raise InputError(
                f"the L0 of {shared.activation!r} follows from its penalty: give what to try, such "
                "as sweep={'sparsity_weight': [1e-4, 3e-4, 1e-3]}"
            )
        sweep = SWEEP
    if kinds is None:
        same = {"input_site": shared.output_site, "skip": False}
        kinds = {"transcoder": {}, "SAE": same}
    if not sweep or not all(len(values) for values in sweep.values()) or not kinds:
        raise InputError("an empty sweep: give at least one kind, one key and one value")
    runs = []
    for kind, changes in kinds.items():
        for values in product(*sweep.values()):
            setting = dict(zip(sweep, values, strict=True))
            config = TrainConfig.from_dict({**shared.to_dict(), **changes, **setting})
            runs.append(_Run(kind, setting, config))
    return runs


def _table(shared: TrainConfig, runs: Sequence[_Run], reports: Sequence[Evaluation]) -> ParetoTable:
    points, bounds = [], {}
    for run, report in zip(runs, reports, strict=True):
        for one in report.layers:
            assert one.alone is not None
            effect = one.alone
            zero, mean = report.ce + effect.ce_change_zero, report.ce + effect.ce_change_mean
            bounds[one.layer] = Bounds(report.ce, mean, zero)
            points.append(
                ParetoPoint(
                    kind=run.kind,
                    layer=one.layer,
                    setting=run.setting,
                    l0=one.l0,
                    ce=report.ce + effect.ce_change,
                    fvu=one.fvu,
                    kl=effect.kl,
                    top1=effect.top1,
                    dead=one.dead,
                )
            )
    order = list(dict.fromkeys(run.kind for run in runs))
    points.sort(key=lambda point: (point.layer, order.index(point.kind), point.l0))
    first = reports[0]
    return ParetoTable(first.model, first.n_predictions, shared.to_dict(), bounds, tuple(points))

"""The greater-than study of the transcoder paper, on the builtin model or on GPT-2.

After "The war lasted from 1732 to 17" a language model puts its probability on 33 to 99. This
script measures by how much (Hanna, Liu, Variengien 2023), replaces the MLPs by transcoders, keeps
the few features that matter most in each layer and sets all others to zero, and does the same with
the neurons of the MLPs themselves (Dunefsky, Chlenski, Nanda 2024).

    python examples/greater_than.py
    python examples/greater_than.py --transcoders builtin/per-layer --last-only
    python examples/greater_than.py --gpt2 --layers 10 --last-only

What the numbers mean, and what they are, is in docs/greater_than.md.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import nnsight
import torch
import typer
from greater_than_study import AIM, Study, make_prompts, run_study

from nnsight_transcoders import TranscoderSet, builtin_model_path

GPT2, GPT2_SET = "openai-community/gpt2", "jacobdunefsky/gpt2small-transcoders"
BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """A row of blocks, one per value, from zero to the largest."""
    top = max(values, default=0.0)
    steps = len(BLOCKS) - 1
    return "".join(BLOCKS[round(steps * max(v, 0.0) / top) if top > 0 else 0] for v in values)


def report(study: Study) -> str:
    """The study as text: how many units each ranking needs, one curve, and the years."""
    n = len(study.layers)
    lines = [
        f"probability difference {study.original:.4f}, with transcoders {study.replaced:.4f}",
        f"units per layer that recover {AIM:.0%} of it ({study.aim:.4f}), "
        f"in layers {', '.join(map(str, study.layers))}:",
    ]
    for curve in study.curves:
        k = curve.needed(study.aim)
        found = "not reached" if k is None else f"{k} per layer, {k * n} in all"
        lines.append(f"  {curve.units:9} by {curve.ranking:18} {found}")
    best = [study.best(units) for units in ("features", "neurons")]
    for curve in best:
        k = study.fewest(curve.units)
        lines.append(f"fewest {curve.units}: {k} per layer, by {curve.ranking}")
    lines.append("kept per layer, and the probability difference with these features and neurons:")
    left, right = (dict(curve.points) for curve in best)
    lines += [f"  {k:5} {left[k]:+.4f} {right[k]:+.4f}" for k in sorted(left.keys() & right.keys())]
    lines.append(
        f"activation over the first years {study.starts[0]:02d} to {study.starts[-1]:02d}:"
    )
    for one in study.years:
        name = f"layer {one['layer']} feature {one['feature']} at {one['position']}"
        lines.append(f"  {name:26} {sparkline(one['activation'])}")
    return "\n".join(lines)


def write_files(study: Study, folder: Path) -> list[Path]:
    """Write curves.csv, years.json and, where plotly is installed, greater_than.html."""
    folder.mkdir(parents=True, exist_ok=True)
    curves, years = folder / "curves.csv", folder / "years.json"
    with curves.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("units", "ranking", "kept_per_layer", "probability_difference"))
        for curve in study.curves:
            rows.writerows((curve.units, curve.ranking, *point) for point in curve.points)
    years.write_text(
        json.dumps({"starts": study.starts, "features": study.years}, indent=1), encoding="utf-8"
    )
    if importlib.util.find_spec("plotly") is None:
        return [curves, years]
    return [curves, years, _plot(study, folder / "greater_than.html")]


def _plot(study: Study, path: Path) -> Path:
    """Both figures as one self-contained page."""
    from plotly import graph_objects  # type: ignore[reportMissingImports]
    from plotly.subplots import make_subplots  # type: ignore[reportMissingImports]

    figure = make_subplots(
        rows=2, cols=1, subplot_titles=("units kept per layer", "activation over the first years")
    )
    for curve in study.curves:
        kept, values = zip(*curve.points, strict=True)
        name = f"{curve.units} by {curve.ranking}"
        figure.add_trace(graph_objects.Scatter(x=kept, y=values, name=name), row=1, col=1)
    for one in study.years:
        name = f"layer {one['layer']} feature {one['feature']}"
        trace = graph_objects.Scatter(x=study.starts, y=one["activation"], name=name)
        figure.add_trace(trace, row=2, col=1)
    figure.add_hline(y=study.aim, line_dash="dot", row=1, col=1)  # type: ignore[arg-type]
    figure.update_layout(height=900)
    figure.write_html(path, include_plotlyjs=True)
    return path


def load(gpt2: bool, name: str) -> tuple[Any, TranscoderSet]:
    """The model and its set."""
    source = GPT2 if gpt2 else builtin_model_path()
    model = nnsight.TransformersModel(source, task="text-generation", dispatch=True)
    return model, TranscoderSet.from_pretrained(GPT2_SET if gpt2 else name, dtype=torch.float32)


def main(
    gpt2: Annotated[bool, typer.Option(help=f"{GPT2} with {GPT2_SET}")] = False,
    transcoders: Annotated[str, typer.Option(help="A set of the builtin model")] = "builtin/skip",
    layers: Annotated[str, typer.Option(help="Comma-separated (default: all of the set)")] = "",
    last_only: Annotated[bool, typer.Option(help="Touch the last position only")] = False,
    noun: Annotated[str, typer.Option(help="What lasted")] = "war",
    century: Annotated[int, typer.Option(help="The first two digits")] = 17,
    every: Annotated[int, typer.Option(help="Take every so manieth first year", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the files")] = Path("greater_than"),
) -> None:
    """Measure how few features, and how few neurons, recover the greater-than behaviour."""
    model, chosen = load(gpt2, transcoders)
    numbers = [int(part) for part in layers.split(",")] if layers else list(chosen.layers)
    prompts = make_prompts(model.tokenizer, noun, century, range(2, 99, every))
    study = run_study(model, chosen, prompts, layers=numbers, last_only=last_only)
    typer.echo(report(study))
    for path in write_files(study, out):
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)

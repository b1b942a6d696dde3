"""What the command line prints: text, tables and JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from nnsight_transcoders.circuits.graph import AttributionGraph

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_text(text: str) -> None:
    """Text as it is: lines are not broken at the terminal's width, which would break paths."""
    out.print(text, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """One JSON object; NaN is refused."""
    out.print_json(json.dumps(data, allow_nan=False), indent=None)


def graph_info(graph: AttributionGraph) -> dict[str, Any]:
    """A graph's size, scores and logits, JSON-ready."""
    logits = graph.of_kind("logit").tolist()
    return {
        "prompt_tokens": list(graph.tokens),
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "completeness_error": graph.completeness_error,
        "replacement_score": graph.replacement_score,
        "completeness_score": graph.completeness_score,
        "logits": [
            {
                "token": name,
                "probability": float(graph.probability[i]),
                "logit": float(graph.value[i]),
            }
            for name, i in zip(graph.target_names, logits, strict=True)
        ],
        "metadata": graph.metadata,
    }


def print_layers(layers: dict[str, dict[str, Any]]) -> None:
    """A table of a set's layers from their configs."""
    table = Table("layer", "d_model", "d_transcoder", "activation", "sites", "skip", "dtype")
    for number, config in layers.items():
        k = f" k={config['k']}" if config["k"] else ""
        table.add_row(
            number,
            str(config["d_in"]),
            str(config["d_transcoder"]),
            f"{config['activation']}{k}",
            f"{config['input_site']} -> {config['output_site']}",
            "yes" if config["skip"] else "no",
            config["dtype"],
        )
    out.print(table)

"""The documentation's table of what remote requests cost.

python -m nnsight_transcoders.remote.cost_table
"""

from __future__ import annotations

import sys
from typing import Any

from .payload import KNOWN_SHAPES, Kind, estimate_payload, megabytes

#: Row of the table -> kind of request and its numbers.
ROWS: tuple[tuple[str, Kind, dict[str, Any]], ...] = (
    ("graph, first request: 32 tokens", "collect", {"n_positions": 32}),
    ("graph, first request: 128 tokens", "collect", {"n_positions": 128}),
    ("graph, second request: 32 tokens", "edges", {"n_positions": 32}),
    ("attached model, 10 features", "rows", {"n_features": 10}),
    ("`graph.intervene`, 10 features", "intervention", {"n_features": 10}),
    (
        "the same, 100 others read",
        "intervention",
        {"n_features": 10, "n_read": 100},
    ),
    ("one layer's weights, 16,384 features", "weights", {"n_layers": 1}),
    ("features of all layers, 32 tokens", "client-side features", {"n_positions": 32}),
    (
        "activations of one layer, 2,048 tokens",
        "activations",
        {"n_positions": 2048, "n_layers": 1},
    ),
)


def cost_table() -> str:
    """The table in Markdown: bytes up and down, per kind of request and model."""
    lines = [
        "| request | " + " | ".join(KNOWN_SHAPES) + " |",
        "| --- |" + " --- |" * len(KNOWN_SHAPES),
    ]
    for name, kind, numbers in ROWS:
        cells = []
        for shape in KNOWN_SHAPES.values():
            found = estimate_payload(kind, shape, **numbers)
            cells.append(f"{megabytes(found.up)} / {megabytes(found.down)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(cost_table())

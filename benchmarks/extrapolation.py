"""What a graph costs on models too large for this machine, on paper: docs/scaling.md.

    python benchmarks/extrapolation.py

Operations of the edge phase from the count in docs/scaling.md, memory from what is held there,
bytes over the wire from ``estimate_payload``. Features: 50 active ones for each token and layer,
spread evenly, no more distinct ones than a layer has; ``--nodes`` of them become targets.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from nnsight_transcoders.remote.payload import KNOWN_SHAPES, ModelShape, estimate_payload

GB = 2**30


@dataclass(frozen=True)
class Attention:
    """The widths that a model's shape does not say.

    Attributes:
        heads: H.
        out: HE, of all query heads.
        value: KE, of all value heads.
        post_norm: Whether a norm follows attention.
        d_transcoder: Features a layer, of a set that is published or might be.
    """

    heads: int
    out: int
    value: int
    post_norm: bool
    d_transcoder: int


_GEMMA_9B = replace(
    KNOWN_SHAPES["Gemma-2-2B"], n_layers=42, d_model=3584, n_heads=16, n_modules=637, n_norms=169
)
MODELS: dict[str, tuple[ModelShape, Attention]] = {
    "GPT-2": (KNOWN_SHAPES["GPT-2"], Attention(12, 768, 768, False, 24576)),
    "Gemma-2-9B": (_GEMMA_9B, Attention(16, 4096, 2048, True, 16384)),
    "Llama-3.1-70B": (KNOWN_SHAPES["Llama-3.1-70B"], Attention(64, 8192, 1024, False, 131072)),
}


def features(shape: ModelShape, attention: Attention, n_positions: int) -> tuple[int, int]:
    """Active features, and the distinct ones among them at most."""
    active = 50 * shape.n_layers * n_positions
    return active, min(active, shape.n_layers * attention.d_transcoder)


def operations(shape: ModelShape, attention: Attention, n_positions: int, n_nodes: int) -> float:
    """Floating-point operations of the edge phase, targets spread evenly."""
    total, d = 0.0, shape.d_model
    for layer in range(shape.n_layers):
        for position in range(n_positions):
            reach = position + 1
            if layer:
                total += 4 * d * attention.out + 2 * reach * attention.heads * d
                full = 2 * reach * d * (attention.out + attention.value)
                full += reach**2 * attention.out
                total += (layer - 1) * full + min(reach**2 * d, full)
            total += 2 * d * 50 * layer * reach
    return total * n_nodes / (shape.n_layers * n_positions)


def held(
    shape: ModelShape, attention: Attention, n_positions: int, n_nodes: int
) -> dict[str, float]:
    """Bytes held when edges are computed, by what they are (float32 but for the run's values)."""
    layers, d = shape.n_layers, shape.d_model
    active, distinct = features(shape, attention, n_positions)
    maps = d * (attention.out + 2 * attention.value) + d * attention.out * attention.post_norm
    columns = active + (layers + 1) * n_positions
    return {
        "patterns": layers * shape.n_heads * n_positions**2 * shape.itemsize,
        "streams": layers * (shape.streams + 3) * n_positions * d * shape.itemsize,
        "maps": 4 * layers * maps,
        "rows": 4 * 2 * distinct * d,
        "edges": 4 * min(n_nodes, active) * columns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=2000)
    nodes = parser.parse_args().nodes
    names = ("patterns", "streams", "maps", "rows", "edges")
    lines = [
        "| model | T | collect down | edges up | edges down | Tflop | "
        + " | ".join(f"{name} GB" for name in names)
        + " |",
        "| --- " * (6 + len(names)) + "|",
    ]
    for model, (shape, attention) in MODELS.items():
        for n_positions in (32, 128, 512, 2048):
            collect = estimate_payload("collect", shape, n_positions=n_positions)
            active, distinct = features(shape, attention, n_positions)
            edges = estimate_payload(
                "edges",
                shape,
                n_positions=n_positions,
                n_active=active,
                n_unique=distinct,
                n_nodes=nodes,
            )
            work = operations(shape, attention, n_positions, nodes) / 1e12
            memory = held(shape, attention, n_positions, nodes)
            cells = [model, f"{n_positions:,}", *str(collect).split(", ")[1:]]
            cells += [part.rsplit(" ", 1)[0] for part in str(edges).split(", ")]
            cells += [f"{work:,.1f}", *(f"{memory[name] / GB:.2f}" for name in names)]
            lines.append("| " + " | ".join(cell.replace(" down", "") for cell in cells) + " |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()

"""How much memory an edge job takes on the server, beside the model itself.

Legend: L layers, T positions, D d_model, H heads, n active features, u of them distinct, C columns
of the edge matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nnsight_transcoders.circuits.edges import MEMORY_BUDGET

from .payload import ModelShape, megabytes


@dataclass(frozen=True)
class EdgeMemory:
    """Bytes that an edge job holds at once.

    Attributes:
        maps: All layers' value and output maps, in the model's dtype, where the job has to ask for
            them (a sandboxed job). Where it sees the model's weights it uses those: 0.
        layer: One layer's maps in float32 while a sweep passes it, with the norms folded in.
        vectors: Encoder and decoder rows of the distinct active features, as they travelled; and
            skip matrices.
        streams: Values of the residual stream in float32: errors, and what the constant terms
            alone give.
        patterns: ``L H T^2`` attention weights in the model's dtype.
        sweep: A batch of targets: ``attribute(memory=)``.
        rows: The edge matrix, in the computer's memory: a row for each node, a column for each
            active feature, error and token; and what is cut from it for the nodes.
    """

    maps: int
    layer: int
    vectors: int
    streams: int
    patterns: int
    sweep: int
    rows: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = [f"{field.name} {megabytes(getattr(self, field.name))}" for field in fields(self)]
        return f"{megabytes(self.total)}: {', '.join(parts)}"


def estimate_edge_memory(
    shape: ModelShape,
    *,
    n_positions: int = 32,
    n_active: int | None = None,
    n_unique: int | None = None,
    n_nodes: int = 7500,
    n_targets: int = 10,
    n_written: float = 1,
    itemsize: int = 2,
    skip: bool = False,
    memory: int = MEMORY_BUDGET,
    sandboxed: bool = True,
) -> EdgeMemory:
    """What the second request of a graph takes on the server.

    Args:
        shape: The model (``ModelShape.of``, ``KNOWN_SHAPES``).
        n_positions: T.
        n_active: n; default: 50 for each token and layer.
        n_unique: u; default: n (an upper bound).
        n_nodes: At most so many become nodes.
        n_targets: Traced logits.
        n_written: Layers that a feature writes to, on average: 1, more in a cross-layer set.
        itemsize: Bytes of an element of the transcoder set as stored.
        skip: Whether its transcoders have a skip path.
        memory: ``attribute(memory=)``.
        sandboxed: Whether the job runs in a process without the model's weights, as those of
            NDIF's ordinary keys do.
    """
    layers, width = shape.n_layers, shape.d_model
    n_active = 50 * layers * n_positions if n_active is None else n_active
    unique = n_active if n_unique is None else n_unique
    nodes, others = min(n_nodes, n_active), (layers + 1) * n_positions
    columns = (n_active + others) + (nodes + others)
    return EdgeMemory(
        maps=layers * shape.map_elements * shape.itemsize if sandboxed else 0,
        layer=2 * 4 * shape.map_elements,
        vectors=round(((1 + n_written) * unique + skip * layers * width) * width * itemsize),
        streams=4 * 4 * layers * n_positions * width,
        patterns=layers * shape.n_heads * n_positions**2 * shape.itemsize,
        sweep=memory,
        rows=4 * (nodes + n_targets) * columns,
    )

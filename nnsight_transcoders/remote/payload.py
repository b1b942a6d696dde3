"""How many bytes a remote request sends and brings back, known before it is sent.

Everything follows from shapes: no weights and no server are needed, so the cost of a graph of a
model of any size can be looked up beforehand. nnsight compresses what travels (zstd); tensors gain
little by it, since their mantissas are as good as random.

Legend: L layers, T positions, D d_model, H heads, V vocabulary, F active features.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import zstandard
from torch import Tensor, nn

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import Sites

from .shipping import PACKAGE, shipped_sources

_COLLECT = f"{PACKAGE}.remote.packing:read_packed"
_EDGES = f"{PACKAGE}.remote.edge_job:graph_edges"
_ATTACHED = f"{PACKAGE}.attachment.remote_layers:build"
_VALUES = f"{PACKAGE}.site_reads:read_values"
_INTERVENE = f"{PACKAGE}.circuits.intervention_job:run_interventions"

#: What a request is for.
Kind = Literal[
    "collect", "edges", "rows", "intervention", "weights", "client-side features", "activations"
]
#: Share that is left of tensors after compression, by bytes an element: measured on the rows of
#: trained sets and on activations (docs/remote.md).
COMPRESSED = {8: 0.95, 4: 0.93, 2: 0.87}
#: Compressed bytes of a request beside its code and its tensors: at all, and for each module of
#: the model, which it refers to by name.
FRAME_BYTES, MODULE_BYTES = 3_000, 8.5
#: The same of an answer: at all, and for each tensor in it.
ANSWER_BYTES, TENSOR_BYTES = 2_000, 100


#: Requests are planned this much smaller than the bound: not all of one is tensors.
MARGIN = 1.05


@dataclass(frozen=True)
class Payload:
    """Bytes of one request.

    Attributes:
        up: Sent to the server.
        down: Sent back.
    """

    up: int
    down: int

    def __str__(self) -> str:
        return f"{megabytes(self.up)} up, {megabytes(self.down)} down"


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that payloads depend on.

    Attributes:
        n_layers: L.
        d_model: D.
        n_heads: H.
        vocab_size: V.
        n_modules: All modules of its tree.
        n_norms: Norms on the residual path.
        streams: ``(T, D)`` values a layer that come back from a collected run: attention's
            output, the MLP's input and output; with norms after them (Gemma 2) also what those
            give.
        itemsize: Bytes of an element on the server.
        map_elements: Weights of a layer's value and output maps (a value map that is fused with
            queries and keys counts whole).
    """

    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    n_modules: int
    n_norms: int
    streams: int
    itemsize: int = 2
    map_elements: int = 0

    @classmethod
    def of(cls, module: nn.Module, sites: Sites) -> ModelShape:
        """From a module tree."""
        first = sites.layers[0]
        roles = (
            first.attention_norm,
            first.attention_post_norm,
            first.mlp_norm,
            first.mlp_post_norm,
        )
        after = (first.attention_post_norm is not None) + (first.mlp_post_norm is not None)
        return cls(
            n_layers=sites.n_layers,
            d_model=sites.d_model,
            n_heads=sites.n_heads,
            vocab_size=sites.vocab_size,
            n_modules=sum(1 for _ in module.modules()),
            n_norms=len({role for role in roles if role}) * sites.n_layers + 1,
            streams=3 + after,
            itemsize=next(module.parameters()).element_size(),
            map_elements=sum(
                weights.numel()
                for path in (first.value, first.out_proj)
                if path
                for weights in module.get_submodule(path).parameters()
                if weights.dim() == 2
            ),
        )


#: Models of the documentation's cost table, as NDIF serves them (bfloat16; GPT-2 in float32).
KNOWN_SHAPES = {
    "GPT-2": ModelShape(12, 768, 12, 50257, 164, 25, 3, 4, 4 * 768**2),
    "Gemma-2-2B": ModelShape(26, 2304, 8, 256000, 397, 105, 5, 2, 2304 * (1024 + 2048)),
    "Llama-3.1-8B": ModelShape(32, 4096, 32, 128256, 423, 65, 3, 2, 4096 * (1024 + 4096)),
    "Llama-3.1-70B": ModelShape(80, 8192, 64, 128256, 1047, 161, 3, 2, 8192 * (1024 + 8192)),
}


def estimate_payload(
    kind: Kind,
    shape: ModelShape,
    *,
    n_positions: int = 32,
    n_active: int | None = None,
    n_unique: int | None = None,
    n_nodes: int = 7500,
    n_targets: int = 10,
    n_layers: int | None = None,
    n_features: int = 1,
    n_read: int = 0,
    d_transcoder: int = 16384,
    n_written: float = 1,
    itemsize: int = 2,
    skip: bool = False,
) -> Payload:
    """Bytes up and down of one request.

    Args:
        kind: ``"collect"``: the first request of a graph. ``"edges"``: the second, where the
            client cannot read the model's weights. ``"rows"``: single features of an attached
            model. ``"intervention"``: ``graph.intervene``.
            ``"weights"``: a replaced layer whose transcoder travels. ``"client-side features"``:
            the values at the input sites come back. ``"activations"``: input- and output-site
            values for training come back.
        shape: The model (``ModelShape.of``, ``KNOWN_SHAPES``).
        n_positions: Tokens of the prompt, or of the chunk for ``"activations"``.
        n_active: Active features; default: 50 for each token and layer.
        n_unique: Different ones among them; default: ``n_active`` (an upper bound).
        n_nodes: At most so many become nodes.
        n_targets: Traced logits.
        n_layers: Layers that are read or replaced; default: all.
        n_features: Edited features, for ``"rows"`` and ``"intervention"``.
        n_read: Other features that are read, for ``"intervention"``.
        d_transcoder: Features a layer, for ``"weights"``.
        n_written: Layers that a feature writes to, on average: 1, more in a cross-layer set.
        itemsize: Bytes of an element of the transcoder set as stored.
        skip: Whether its transcoders have a skip path (its matrices travel with ``"edges"``).

    Raises:
        InputError: An unknown kind.
    """
    layers = shape.n_layers if n_layers is None else n_layers
    values = n_positions * shape.d_model
    if kind == "collect":
        return collect_bytes(shape, n_positions)
    if kind == "edges":
        n_active = 50 * shape.n_layers * n_positions if n_active is None else n_active
        unique = n_active if n_unique is None else n_unique
        rows = (1 + n_written) * unique + skip * shape.n_layers * shape.d_model
        up = edges_up_bytes(shape, n_positions, n_active, rows, itemsize)
        nodes = min(n_nodes, n_active)
        down = edges_down_bytes(n_active, nodes, shape.n_layers, n_positions, n_targets)
        return Payload(up, round(COMPRESSED[4] * down))
    if kind == "rows":
        up = n_features * (2 * shape.d_model + 2) * itemsize
        up = round(COMPRESSED[itemsize] * up)
        return Payload(base_bytes(shape, _ATTACHED) + up, ANSWER_BYTES)
    if kind == "intervention":
        rows = (1 + n_written) * n_features + n_read
        up = round(COMPRESSED[itemsize] * rows * shape.d_model * itemsize)
        down = 2 * (shape.vocab_size * shape.itemsize + 4 * (n_features + n_read))
        up += base_bytes(shape, _INTERVENE) + 16 * n_positions
        return Payload(up, round(COMPRESSED[shape.itemsize] * down) + ANSWER_BYTES)
    if kind == "weights":
        rows = (1 + n_written) * d_transcoder + 1 + skip * shape.d_model
        one = rows * shape.d_model + d_transcoder
        up = COMPRESSED[itemsize] * layers * one * itemsize
        return Payload(base_bytes(shape, _ATTACHED) + round(up), ANSWER_BYTES)
    if kind in ("client-side features", "activations"):
        sites = 2 if kind == "activations" else 1
        down = COMPRESSED[shape.itemsize] * sites * layers * values * shape.itemsize
        return Payload(base_bytes(shape, _VALUES) + 8 * n_positions, round(down) + ANSWER_BYTES)
    raise InputError(f"unknown kind of request {kind!r}")


def base_bytes(shape: ModelShape, entry: str = _EDGES) -> int:
    """A request without tensors: its code, and the names of the model's modules."""
    return code_bytes(entry) + FRAME_BYTES + round(MODULE_BYTES * shape.n_modules)


@cache
def code_bytes(entry: str) -> int:
    """The compressed size of the code that a request ships.

    Args:
        entry: ``"module:function"`` of what it runs.
    """
    module, _, name = entry.partition(":")
    sources = shipped_sources(getattr(importlib.import_module(module), name))
    return len(zstandard.ZstdCompressor(level=6).compress("".join(sources.values()).encode()))


def collect_bytes(shape: ModelShape, n_positions: int) -> Payload:
    """The first request of a graph."""
    pattern = shape.n_layers * shape.n_heads * n_positions * (n_positions + 1) // 2
    values = shape.streams * shape.n_layers * n_positions * shape.d_model
    elements = pattern + values + n_positions * shape.d_model + shape.vocab_size
    norms = 4 * 2 * shape.n_norms * shape.d_model
    down = COMPRESSED[shape.itemsize] * elements * shape.itemsize + COMPRESSED[4] * norms
    down += ANSWER_BYTES + TENSOR_BYTES * (8 + shape.n_norms)
    return Payload(base_bytes(shape, _COLLECT) + 8 * n_positions, round(down))


def edges_up_bytes(
    shape: ModelShape, n_positions: int, n_active: int, n_rows: float, itemsize: int
) -> int:
    """What an edge request sends: rows of encoders, decoders and skip paths, errors, norms."""
    others = (
        4 * shape.n_layers * n_positions * shape.d_model  # errors
        + shape.itemsize * 2 * shape.n_norms * shape.d_model
        + n_active * 16  # position, index, activation, pre-activation
    )
    up = COMPRESSED[itemsize] * n_rows * shape.d_model * itemsize + COMPRESSED[4] * others
    return base_bytes(shape) + round(up)


def edges_down_bytes(
    n_active: int, n_nodes: int, n_layers: int, n_positions: int, n_targets: int
) -> int:
    """What an edge request brings back at most: about half of a graph's possible edges point
    backwards in layers, and half of the others in positions."""
    sources = min(n_active, n_nodes) + (n_layers + 1) * n_positions
    rows = n_nodes + n_targets
    return rows * sources + rows * sources // 8


def megabytes(n_bytes: float) -> str:
    """A number of bytes for people."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.1f} kB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.2f} GB"


def tensor_bytes(data: Any) -> int:
    """Bytes of all tensors in plain data."""
    if isinstance(data, Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, Mapping):
        return sum(tensor_bytes(value) for value in data.values())
    if isinstance(data, (list, tuple)):
        return sum(tensor_bytes(value) for value in data)
    return 0

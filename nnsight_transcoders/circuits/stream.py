"""What the residual stream of a run is the sum of, as vectors.

``contributions.py`` takes products with one vector; here are the vectors themselves, for what is
not linear in the stream (``qk.py``).

Legend: n components, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contributions import CircuitRun
from .feature_vectors import Kind


@dataclass(frozen=True)
class Component:
    """Something that was added to the stream at one position.

    Attributes:
        kind: As in ``Contribution``; ``"attention"`` is all heads of a layer together.
        layer: Its layer; -1 for embeddings.
        position: Where it stands.
        index: Feature number; -1 otherwise.
    """

    kind: Kind
    layer: int
    position: int
    index: int = -1

    def __str__(self) -> str:
        layer = f" {self.layer}" if self.layer >= 0 else ""
        index = f" {self.index}" if self.kind == "feature" else ""
        return f"{self.kind}{layer}{index} @{self.position}"


def stream_components(
    circuit: CircuitRun, layer: int, position: int
) -> tuple[list[Component], Tensor]:
    """What a block's input at one position is the sum of.

    Args:
        circuit: The run.
        layer: The block.
        position: Where, counted from 0.

    Returns:
        The n components, and their vectors ``(n, D)``: embeddings; active features, each with all
        that it wrote below ``layer``; per layer the error, attention's linear part, the skip path,
        and the biases of its MLP side and of its attention together.
    """
    names, vectors = _embeddings(circuit, position)
    for source in range(layer):
        found = _features(circuit, source, position, layer)
        names += found[0]
        vectors += [*found[1]]
        found = _layer_parts(circuit, source, position)
        names += found[0]
        vectors += found[1]
    return names, torch.stack(vectors)


def _embeddings(circuit: CircuitRun, position: int) -> tuple[list[Component], list[Tensor]]:
    run, dtype = circuit.run, circuit.dtype
    names, vectors = [Component("token", -1, position)], [run.embedding[position].to(dtype)]
    if run.position_embedding is not None:
        names.append(Component("position", -1, position))
        vectors.append(run.position_embedding[position].to(dtype))
    return names, vectors


def _features(
    circuit: CircuitRun, source: int, position: int, limit: int
) -> tuple[list[Component], Tensor]:
    active = circuit.active.layers.get(source)
    if active is None:
        return [], torch.empty(0)
    rows = (active.position == position).nonzero().flatten()
    at = torch.full_like(rows, position)
    decoder = active.decoder_of(rows)
    vectors = torch.zeros_like(decoder[:, 0])
    for j, target in enumerate(active.targets):
        if target < limit:
            vectors += circuit.frozen.to_stream(target, decoder[:, j], at)
    names = [Component("feature", source, position, i) for i in active.index[rows].tolist()]
    return names, vectors * active.activation[rows, None]


def _layer_parts(
    circuit: CircuitRun, layer: int, position: int
) -> tuple[list[Component], list[Tensor]]:
    """The error, attention, skip path and biases of one layer."""
    block, at = circuit.frozen.layers[layer], torch.tensor([position])

    def written(vector: Tensor) -> Tensor:
        return circuit.frozen.to_stream(layer, vector[None], at)[0]

    vectors = {
        "error": written(circuit.active.error[layer][position]),
        "attention": circuit.attention_output(layer)[position],
        "bias": circuit.attention_bias(layer)[position],
    }
    decoder_bias = circuit.active.bias[layer]
    if decoder_bias is not None:
        vectors["bias"] = vectors["bias"] + written(decoder_bias)
    if block.write is not None and block.write.bias is not None:
        vectors["bias"] = vectors["bias"] + block.write.bias
    if block.skip is not None:
        vectors["skip"] = written(block.skip @ circuit.inputs(layer)[position])
    names = [Component(kind, layer, position) for kind in vectors]  # type: ignore[arg-type]
    return names, [*vectors.values()]

"""The strongest virtual weights: of one feature, or of a whole set, without an F x F matrix.

One feature's connections are a matrix-vector product per layer, read in chunks. All connections are
products of chunks with a running top k; rows are taken in order of their norm, and a pair of chunks
whose norms cannot make a weight as large as the k-th so far is left out (Cauchy-Schwarz), so that
the search is exact.

Legend: F features of a layer, n rows of a chunk, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .invariant import Head, InvariantModel, invariant_model
from .ov import OVCircuit

#: Rows of a layer taken at a time.
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Connection:
    """Two features and the virtual weight between them.

    Attributes:
        source_layer: The layer of the feature that writes.
        source: Its number.
        target_layer: The layer of the feature that reads.
        target: Its number.
        weight: See ``virtual_weights``.
    """

    source_layer: int
    source: int
    target_layer: int
    target: int
    weight: float

    def __str__(self) -> str:
        return (
            f"{self.weight:+.4f}  feature {self.source_layer} {self.source} -> "
            f"feature {self.target_layer} {self.target}"
        )


def top_connections(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    feature: int,
    *,
    direction: Literal["up", "down"] = "up",
    head: Head | None = None,
    k: int = 20,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> list[Connection]:
    """The features of all other layers that one feature is most strongly connected with.

    Args:
        model: An nnsight model.
        transcoders: Its set, read some rows at a time; no layer is loaded.
        layer: The feature's layer.
        feature: Its number.
        direction: ``"up"``: the features that read what it writes; ``"down"``: those that write
            what it reads.
        head: The path, as for ``virtual_weights``.
        k: How many.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. Its norms, and
            the maps of ``head``, are asked for.

    Returns:
        By magnitude, largest first.

    Raises:
        InputError: A limit, direction, feature or head that there is not.
    """
    if direction not in ("up", "down"):
        raise InputError(f"direction must be 'up' or 'down', got {direction!r}")
    invariant, best = invariant_model(model, sites, remote), _Best(k)
    ov = None if head is None else invariant.ov(head)
    which = "decoder" if direction == "up" else "encoder"
    own = transcoders.rows(layer, [feature], which)
    for other in transcoders.layers:
        source, target = (layer, other) if direction == "up" else (other, layer)
        limit = invariant.limit(target, head)
        if transcoders.targets(source)[0] >= limit:
            continue
        if direction == "up":
            weights = _reading(invariant, transcoders, own, source, target, ov, limit)
        else:
            weights = _writing(invariant, transcoders, own, source, target, ov, limit)
        top = weights.abs().topk(min(k, len(weights))).indices
        mine = torch.full_like(top, feature)
        pair = (mine, top) if direction == "up" else (top, mine)
        best.add(source, target, *pair, weights[top])
    return best.connections()


def _reading(
    invariant: InvariantModel,
    transcoders: TranscoderSet,
    own: Tensor,
    source: int,
    target: int,
    ov: OVCircuit | None,
    limit: int,
) -> Tensor:
    """Weights ``(F,)`` from one feature's decoder row to all features of layer ``target``."""
    vector = invariant.written_below(transcoders, source, own, limit)
    if ov is not None:
        vector = ov.forward(vector)
    norm = invariant.read_norm(transcoders, target)
    vector = (vector if norm is None else norm.fold_out(vector))[0]
    chunks = _chunks(transcoders, target, "encoder")
    return torch.cat([invariant.cast(chunk) @ vector for chunk in chunks])


def _writing(
    invariant: InvariantModel,
    transcoders: TranscoderSet,
    own: Tensor,
    source: int,
    target: int,
    ov: OVCircuit | None,
    limit: int,
) -> Tensor:
    """Weights ``(F,)`` from all features of layer ``source`` to one feature's encoder row."""
    vector = invariant.read(transcoders, target, own)
    if ov is not None:
        vector = ov.pull_back(vector)
    vectors = []
    for layer in transcoders.targets(source):
        norm = invariant.write_norm(transcoders, layer) if layer < limit else None
        if layer < limit:
            vectors.append((vector if norm is None else norm.fold_in(vector))[0])
    parts = []
    for chunk in _chunks(transcoders, source, "decoder"):
        slots = chunk[:, None] if chunk.dim() == 2 else chunk
        parts.append(sum(invariant.cast(slots[:, j]) @ v for j, v in enumerate(vectors)))
    return torch.cat(parts)  # type: ignore[arg-type]


def strongest_connections(
    model: Any,
    transcoders: TranscoderSet,
    k: int = 100,
    *,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    head: Head | None = None,
    verbose: bool = False,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> list[Connection]:
    """The strongest connections between any two features of the set: exact, streamed.

    Args:
        model: An nnsight model.
        transcoders: Its set; of two layers at a time, the encoder or the decoder is in memory.
        k: How many.
        sources: Layers of the features that write; all by default.
        targets: Layers of those that read; all by default.
        head: The path, as for ``virtual_weights``.
        verbose: Show progress.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. Its norms, and
            the maps of ``head``, are asked for.

    Returns:
        By magnitude, largest first. The work is up to ``F x F x D`` per pair of layers: for large
        sets, choose layers.

    Raises:
        InputError: A layer, head or limit that there is not.
    """
    invariant, best = invariant_model(model, sites, remote), _Best(k)
    ov = None if head is None else invariant.ov(head)
    pairs = [
        (source, target)
        for target in (transcoders.layers if targets is None else targets)
        for source in (transcoders.layers if sources is None else sources)
        if transcoders.targets(source)[0] < invariant.limit(target, head)
    ]
    # Pairs of one target follow each other: its encoder is read once for all of them.
    read_of: int | None = None
    read = torch.empty(0)
    for source, target in tqdm(pairs, desc="layers", disable=not verbose, leave=False):
        limit = invariant.limit(target, head)
        written = [
            invariant.written_below(transcoders, source, chunk, limit)
            for chunk in _chunks(transcoders, source, "decoder")
        ]
        if target != read_of:
            read = torch.empty(0)  # the last target's goes before the next one's comes
            chunks = (
                invariant.read(transcoders, target, chunk)
                for chunk in _chunks(transcoders, target, "encoder")
            )
            read_of, read = target, torch.cat([c if ov is None else c @ ov.out for c in chunks])
        if ov is not None:  # both sides meet in the head's own width
            written = [chunk @ ov.value.T for chunk in written]
        _search(best, source, target, torch.cat(written), read)
    return best.connections()


def _search(best: _Best, source: int, target: int, written: Tensor, read: Tensor) -> None:
    """Put the largest of ``written @ read.T`` among the best."""
    by_norm = _by_norm(read)
    for rows, write_norm in _by_norm(written):
        write_chunk = written[rows]
        for columns, read_norm in by_norm:
            if write_norm * read_norm * (1 + 1e-5) <= best.threshold:
                break  # the chunks that follow are smaller still
            weights = (write_chunk @ read[columns].T).flatten()
            above = (weights.abs() > best.threshold).nonzero().flatten()
            top = above[weights[above].abs().topk(min(best.k, len(above))).indices]
            row = rows[top // len(columns)]
            best.add(source, target, row, columns[top % len(columns)], weights[top])


def _by_norm(vectors: Tensor) -> list[tuple[Tensor, float]]:
    """Chunks of rows, largest norm first: their numbers, and the largest norm."""
    norms = vectors.norm(dim=1)
    chunks = norms.argsort(descending=True).split(CHUNK_ROWS)
    return [(rows, float(norms[rows[0]])) for rows in chunks]


def _chunks(
    transcoders: TranscoderSet, layer: int, which: Literal["encoder", "decoder"]
) -> Iterator[Tensor]:
    """A layer's encoder or decoder rows, read some at a time.

    Raises:
        CheckpointError: There are NaN or infinite values among them.
    """
    for rows in torch.arange(transcoders.config(layer).d_transcoder).split(CHUNK_ROWS):
        chunk = transcoders.rows(layer, rows, which)
        if not torch.isfinite(chunk.sum(dtype=torch.float64)):
            raise CheckpointError(f"layer {layer}'s {which} holds NaN or infinite values")
        yield chunk


class _Best:
    """A running top k by magnitude: columns of source layer, target layer, source, target."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        self.k, self.threshold = k, -1.0
        self._names = torch.empty(0, 4, dtype=torch.long)
        self._weights = torch.empty(0, dtype=torch.float64)

    def add(self, source: int, target: int, rows: Tensor, columns: Tensor, found: Tensor) -> None:
        """Offer weights from features ``rows`` of one layer to ``columns`` of another."""
        names = torch.empty(len(rows), 4, dtype=torch.long)
        names[:, 0], names[:, 1], names[:, 2], names[:, 3] = source, target, rows, columns
        names = torch.cat([self._names, names])
        weights = torch.cat([self._weights, found.detach().double().cpu()])
        kept = weights.abs().argsort(descending=True, stable=True)[: self.k]
        self._names, self._weights = names[kept], weights[kept]
        if len(kept) == self.k:
            self.threshold = float(self._weights[-1].abs())

    def connections(self) -> list[Connection]:
        """What is kept, largest first."""
        return [
            Connection(source, feature, target, other, weight)
            for (source, target, feature, other), weight in zip(
                self._names.tolist(), self._weights.tolist(), strict=True
            )
        ]

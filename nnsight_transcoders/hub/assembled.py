"""A ``LayerSource`` for layouts that are not one tensor per weight: pieces, and how they fit.

Some formats keep all layers in one tensor, a decoder per target layer, or scales that belong into
the weights. A format writes, per layer, which pieces it needs (``Piece``: a stored tensor or a part
of it) and a function that makes the canonical tensors of them. Every piece says which of its axes
counts features; the function is only allowed operations that treat features one by one, so the same
function serves for whole layers and for single rows, which are then read without the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import build_module
from nnsight_transcoders.hub.tensors import FLOAT_DTYPES, TensorInfo, open_tensors, runs
from nnsight_transcoders.layer_sources import Rows
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, TranscoderConfig

Header = Mapping[str, TensorInfo]
Build = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or a part of it.

    Attributes:
        file: The file it is in.
        key: Its name there.
        shape: The stored tensor's whole shape.
        index: Taken along the first axis, which is then gone (``W_E[layer]``).
        features: The axis that counts features, after ``index``; None where none does.
        start: Where this part's feature 0 lies on that axis.
    """

    file: str
    key: str
    shape: tuple[int, ...]
    index: int | None = None
    features: int | None = None
    start: int = 0


@dataclass(frozen=True)
class Assembly:
    """How one layer is put together.

    Attributes:
        config: The layer's config.
        pieces: The pieces by the names that ``build`` knows them by.
        build: Pieces -> tensors in the canonical form (``source.expected_shape``).
        targets: The layers it writes to, for a part of a cross-layer transcoder.
    """

    config: TranscoderConfig
    pieces: Mapping[str, Piece]
    build: Build
    targets: tuple[int, ...] | None = None


class AssembledSource:
    """A ``LayerSource`` that reads the pieces of a layer when it is used."""

    def __init__(
        self, snapshot: Snapshot, layers: Mapping[int, Assembly], provenance: Mapping[str, Any]
    ) -> None:
        self._snapshot, self._layers = snapshot, dict(sorted(layers.items()))
        self.configs = {layer: plan.config for layer, plan in self._layers.items()}
        files = {piece.file for plan in self._layers.values() for piece in plan.pieces.values()}
        self.provenance = {**snapshot.provenance(), "files": sorted(files), **provenance}

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        """The layer's module; shapes and dtypes are checked on the way."""
        plan = self._layers[layer]
        return build_module(plan.config, plan.build(self._read(layer, None)), plan.targets)

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        """Single rows, made of the same rows of every piece."""
        wanted, order = torch.unique(indices, return_inverse=True)
        tensors = self._layers[layer].build(self._read(layer, wanted))
        rows = tensors["W_enc" if which == "encoder" else "W_dec"][order]
        return rows.to(tensors["W_enc"].dtype)  # as in the module, whose dtype that is

    def _read(self, layer: int, indices: Tensor | None) -> dict[str, Tensor]:
        plan = self._layers[layer]
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(piece.file for piece in plan.pieces.values()):
            path = self._snapshot.path(file)
            mine = {name: piece for name, piece in plan.pieces.items() if piece.file == file}
            with open_tensors(path) as handle:
                present = set(handle.keys())
                keys = {piece.key for piece in mine.values()} & present
                header = {key: _info(handle.get_slice(key)) for key in keys}
                for piece in mine.values():
                    check_piece(str(path), header, piece, present)
                width = plan.config.d_transcoder
                for name, piece in mine.items():
                    found[name] = _read_piece(handle, piece, width, indices)
        return found


def _info(stored: Any) -> TensorInfo:
    return TensorInfo(tuple(stored.get_shape()), stored.get_dtype())


def _read_piece(handle: Any, piece: Piece, width: int, indices: Tensor | None) -> Tensor:
    """One piece, of all features or of those given (sorted, distinct)."""
    if not piece.shape:
        return handle.get_tensor(piece.key)
    stored = handle.get_slice(piece.key)
    lead = () if piece.index is None else (slice(piece.index, piece.index + 1),)
    rest = len(piece.shape) - len(lead)
    if piece.features is None:
        found = stored[lead + (slice(None),) * rest]
        return found if piece.index is None else found[0]
    spans = [(0, width)] if indices is None else runs(indices.tolist())
    parts = []
    for begin, end in spans or [(0, 0)]:
        cut = [slice(None)] * rest
        cut[piece.features] = slice(piece.start + begin, piece.start + end)
        parts.append(stored[(*lead, *cut)])
    found = torch.cat(parts, dim=piece.features + len(lead))
    return found if piece.index is None else found[0]


def check_piece(where: str, header: Header, piece: Piece, present: Collection[str]) -> None:
    """Check that a file has a piece, of the right shape and a float dtype.

    Args:
        where: What to call the file in messages.
        header: Its tensors.
        piece: What is expected.
        present: All names in the file, for the message.

    Raises:
        CheckpointError: Naming the tensor.
    """
    info = header.get(piece.key)
    if info is None:
        raise CheckpointError(
            f"{where} has no tensor {piece.key}; it has {', '.join(sorted(present)) or 'none'}"
        )
    if info.shape != piece.shape:
        raise CheckpointError(
            f"{where}: tensor {piece.key} has shape {info.shape}, expected {piece.shape} from the "
            "config and the other tensors"
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{where}: tensor {piece.key} has dtype {info.torch_name}, expected one of "
            f"{', '.join(FLOAT_DTYPES)}"
        )


def check_file(
    where: str, header: Header, pieces: Collection[Piece], ignored: Collection[str] = ()
) -> None:
    """Check a whole file: every piece is there and fits, and nothing else is.

    Args:
        where: What to call the file in messages.
        header: Its tensors.
        pieces: All pieces that any layer takes from it.
        ignored: Names that are known and carry no weights of their own.

    Raises:
        CheckpointError: Naming the tensors that are missing, do not fit, or are not accounted for.
    """
    for piece in pieces:
        check_piece(where, header, piece, header)
    unexpected = sorted(set(header) - {piece.key for piece in pieces} - set(ignored))
    if unexpected:
        raise CheckpointError(
            f"{where} has tensor(s) {', '.join(unexpected)} that the config does not account for; "
            "reading it without them could give wrong results"
        )


def scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """``tensor * factor``, computed in float32 and returned in the tensor's own dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * factor).to(tensor.dtype)


def summed(tensors: Collection[Tensor]) -> Tensor:
    """The sum, computed in float32 and returned in the first one's dtype."""
    first, *_ = tensors
    wide = torch.promote_types(first.dtype, torch.float32)
    return torch.stack([tensor.to(wide) for tensor in tensors]).sum(0).to(first.dtype)

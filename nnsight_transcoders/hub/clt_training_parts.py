"""Which tensors a layer of a ``clt-training`` checkpoint is made of, and how (``clt_training``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assembled import Build, Header, Piece, scaled, summed

#: Where decoders are kept: in one file per layer without others ("single"), per pair of layers
#: ("pairs"), per source ("source"), per target ("target"), per target source by source ("blocks").
Mode = Literal["single", "pairs", "source", "target", "blocks"]


@dataclass(frozen=True)
class Layout:
    """One layer among those of its checkpoint.

    Attributes:
        mode: Where its decoders are kept.
        layer: Which layer.
        files: Layer -> weights file.
        headers: Layer -> tensors of that file.
        raws: Layer -> config.
    """

    mode: str
    layer: int
    files: Mapping[int, str]
    headers: Mapping[int, Header]
    raws: Mapping[int, Mapping[str, Any]]

    @property
    def targets(self) -> list[int]:
        """The layers it writes to."""
        if self.mode == "single":
            return [self.layer]
        return [layer for layer in self.files if layer >= self.layer]

    @property
    def listed(self) -> bool:
        """Whether biases and skip paths are lists, one entry per layer written to."""
        return self.mode in ("pairs", "source")

    def aliases(self) -> set[str]:
        """Names under which the trainer saves a tensor a second time."""
        if self.mode == "pairs":
            return {"W_dec", "b_dec", "W_skip"}
        return {"b_dec", "W_skip"} if self.mode == "source" else set()


def layer_pieces(layout: Layout, width: int, d_model: int) -> dict[str, Piece]:
    """Everything that layer ``layout.layer`` needs, under names that ``builder`` knows."""
    own, layer = layout.files[layout.layer], layout.layer
    square = (d_model, d_model)
    pieces = {
        "W_enc": Piece(own, "encoder.weight", (width, d_model), features=0),
        "b_enc": Piece(own, "encoder.bias", (width,), features=0),
    }
    for j, target in enumerate(layout.targets):
        pieces[f"W_dec.{j}"] = _decoder(layout, target, width, d_model)
    if layout.listed:
        for source in range(layer + 1):
            key = f"b_decs.{layer - source}"
            pieces[f"b_dec.{source}"] = Piece(layout.files[source], key, (d_model,))
    else:
        pieces["b_dec.0"] = Piece(own, "b_dec", (d_model,))
    if layout.raws[layer].get("skip_connection"):
        pieces["W_skip"] = Piece(own, "W_skips.0" if layout.listed else "W_skip", square)
        later = [f"W_skips.{j}" for j in range(1, len(layout.targets)) if layout.listed]
        present = [key for key in later if key in layout.headers[layer]]
        pieces |= {key: Piece(own, key, square) for key in present}
    if layout.raws[layer].get("normalize_io"):
        pieces["in_norm"] = Piece(own, "in_norm", (1,))
        for j, target in enumerate(layout.targets):
            pieces[f"out_norm.{j}"] = Piece(layout.files[target], "out_norm", (1,))
    return pieces | _post_encoder(layout, width)


def _decoder(layout: Layout, target: int, width: int, d_model: int) -> Piece:
    """The decoder from the layout's layer to ``target``."""
    own, shape = layout.files[layout.layer], (width, d_model)
    if layout.mode == "pairs":
        return Piece(own, f"W_decs.{target - layout.layer}", shape, features=0)
    if layout.mode in ("single", "source"):
        return Piece(own, "W_dec", shape, features=0)
    file = layout.files[target]
    if layout.mode == "target":
        return Piece(file, "W_dec", shape, features=0)
    blocks = (width * (target + 1), d_model)
    return Piece(file, "W_dec", blocks, features=0, start=width * layout.layer)


def _post_encoder(layout: Layout, width: int) -> dict[str, Piece]:
    """The post-encoder's tensors that are there, as ``post_enc.{j}`` and ``post_enc_scale.{j}``."""
    found, header = {}, layout.headers[layout.layer]
    for j in range(len(layout.targets)):
        for name in ("post_enc", "post_enc_scale"):
            key = name if layout.mode == "single" else f"{name}s.{j}"
            if key in header:
                file = layout.files[layout.layer]
                found[f"{name}.{j}"] = Piece(file, key, (width,), features=0)
    return found


def builder(layout: Layout, where: str) -> Build:
    """The function that makes the canonical tensors of the pieces."""

    def build(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _check_zeros(tensors, where)
        root = math.sqrt(tensors["W_enc"].shape[1])
        s_in = root / _norm(tensors, "in_norm", where) if "in_norm" in tensors else 1.0
        s_out = [
            _norm(tensors, f"out_norm.{j}", where) / root if "in_norm" in tensors else 1.0
            for j in range(len(layout.targets))
        ]
        decoders = []
        for j, factor in enumerate(s_out):
            scale = tensors.get(f"post_enc_scale.{j}")
            decoder = tensors[f"W_dec.{j}"]
            decoders.append(
                scaled(decoder, factor if scale is None else scale.float()[:, None] * factor)
            )
        biases = [tensor for name, tensor in tensors.items() if name.startswith("b_dec.")]
        found = {
            "W_enc": scaled(tensors["W_enc"], s_in),
            "b_enc": tensors["b_enc"],
            "W_dec": decoders[0] if layout.mode == "single" else torch.stack(decoders, dim=1),
            "b_dec": scaled(summed(biases), s_out[0]),
        }
        if "W_skip" in tensors:
            found["W_skip"] = scaled(tensors["W_skip"], s_in * s_out[0])
        return found

    return build


def _norm(tensors: Mapping[str, Tensor], name: str, where: str) -> float:
    value = float(tensors[name])
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{where}: {name} is {value}, not a positive number")
    return value


def _check_zeros(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        kind = name.split(".")[0]
        if kind in ("post_enc", "W_skips") and tensor.any():
            what = (
                "adds a bias to active features"
                if kind == "post_enc"
                else "is a skip path from one layer to a later one"
            )
            raise CheckpointError(
                f"{where}: {name} is not zero; it {what}, which has no place in this package's "
                "transcoders"
            )

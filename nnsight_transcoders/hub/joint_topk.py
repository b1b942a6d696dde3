"""ByteDance's cross-layer transcoder with one TopK over all layers (``Cross-Layer-TopK-CLT``).

Per layer ``W_enc_{l} (F, d)``, ``b_enc_{l}``, ``b_dec_{l}``, ``W_dec_{l} (F, N - l, d)`` whose
``j``-th slice writes to layer ``l + j``, and ``W_dec_norm_{l} (F)``: the norm of all a feature
writes, by which activations are weighed when the k largest of all layers together are kept
(activation ``jointtopk``). From the raw residual stream to the MLP's output. Read from the model
card; which of the files holds which tensor is not documented there, so tensors are found by name.
The stored norms are compared with those of the weights. What ``factors.safetensors`` scales is not
documented either: it is not applied, and opening says so unless ``factors="ignore"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.assembled import (
    AssembledSource,
    Assembly,
    Build,
    Header,
    Piece,
    check_file,
)
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_length, tensor_shape
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    check_whole,
    choose_layers,
)
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "joint-topk"
FACTORS = "factors.safetensors"

_FILE = re.compile(r"^(W_enc|W_dec|W_dec_norm|b_enc|b_dec)_(\d+)\.safetensors$")
_KEY = re.compile(r"^(W_enc|W_dec|W_dec_norm|b_enc|b_dec)_(\d+)$")
#: How far stored norms may be from those of the weights (16-bit weights are rounded).
_TOLERANCE = 0.02


def is_joint_topk(snapshot: Snapshot) -> bool:
    """Whether the files show this layout rather than circuit-tracer's."""
    matches = [match for name in snapshot.files if (match := _FILE.match(name))]
    norms = any(match[1] == "W_dec_norm" for match in matches)
    return bool(matches) and (norms or FACTORS in snapshot.files)


def _detect(snapshot: Snapshot) -> Evidence | None:
    if not is_joint_topk(snapshot):
        return None
    return Evidence(Strength.TENSOR_KEYS, f"W_dec_{{i}} with W_dec_norm_{{i}} or {FACTORS}")


def open_joint_topk(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> AssembledSource:
    """Open a checkpoint in this layout; headers are read.

    Raises:
        CheckpointError: Files that are not as they should be, no k, or factors that are not used.
        ConfigError: An option with a value it cannot have.
        InputError: Only some of its layers are asked for.
    """
    _check_factors(snapshot, options)
    k = options.get("k")
    if not isinstance(k, int):
        raise CheckpointError(
            f"{snapshot.where}: the files do not say how many features are kept over all layers: "
            "pass k=... (360 for ByteDance-Seed/Cross-Layer-TopK-CLT)"
        )
    headers = snapshot.headers([name for name in snapshot.files if _FILE.match(name)])
    places = {key: file for file, header in headers.items() for key in header if _KEY.match(key)}
    numbers = sorted(
        int(match[2]) for key in places if (match := _KEY.match(key)) and "W_enc" in key
    )
    if not numbers or numbers != list(range(len(numbers))):
        raise CheckpointError(
            f"{snapshot.where} has W_enc_{{i}} for layers {numbers}; a cross-layer transcoder "
            "needs all of them from 0 on"
        )
    check_whole(numbers, choose_layers(numbers, layers, snapshot.where), snapshot.where)
    plans = {
        layer: _plan(snapshot, layer, len(numbers), places, headers, {**options, "k": k})
        for layer in numbers
    }
    for file, header in headers.items():
        pieces = [p for plan in plans.values() for p in plan.pieces.values() if p.file == file]
        check_file(f"{file} of {snapshot.where}", header, pieces)
    ignored = [FACTORS] if FACTORS in snapshot.files else []
    provenance = {"format": NAME, "config": {}, "folds": [], "ignored": ignored}
    return AssembledSource(snapshot, plans, provenance)


def _check_factors(snapshot: Snapshot, options: Mapping[str, Any]) -> None:
    given = options.get("factors")
    if given not in (None, "ignore"):
        raise ConfigError(f"factors must be 'ignore' or left out, got {given!r}")
    if FACTORS in snapshot.files and given is None:
        header = snapshot.header(FACTORS)
        held = ", ".join(f"{key} {info.shape}" for key, info in sorted(header.items())[:6])
        raise CheckpointError(
            f"{snapshot.where} has {FACTORS} ({held}), and what it scales is not documented: "
            "pass factors='ignore' to read the weights as they are, and look at the error nodes "
            "of a first graph before you believe them"
        )


def _plan(
    snapshot: Snapshot,
    layer: int,
    n_layers: int,
    places: Mapping[str, str],
    headers: Mapping[str, Header],
    options: Mapping[str, Any],
) -> Assembly:
    header = {key: headers[file][key] for key, file in places.items()}
    where = snapshot.where
    d_in = tensor_shape(header, f"W_enc_{layer}", 2, where)[1]
    width = tensor_length(header, f"b_enc_{layer}", where)
    d_out = tensor_length(header, f"b_dec_{layer}", where)
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "W_enc": ((width, d_in), 0),
        "b_enc": ((width,), 0),
        "b_dec": ((d_out,), None),
        "W_dec": ((width, n_layers - layer, d_out), 0),
        "W_dec_norm": ((width,), 0),
    }
    pieces = {}
    for name, (shape, axis) in shapes.items():
        key = f"{name}_{layer}"
        if key not in places and name != "W_dec_norm":
            raise CheckpointError(f"{where} has no tensor {key} in any of its files")
        if key in places:
            pieces[name] = Piece(places[key], key, shape, features=axis)
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_out,
        d_transcoder=width,
        layer=layer,
        activation="jointtopk",
        k=options["k"],
        input_site=options.get("input_site", "R"),
        output_site=options.get("output_site", "O"),
        cross_layer=True,
        leading_positions=options.get("leading_positions", 0),
        base_model=options.get("base_model"),
        dtype=header[f"W_enc_{layer}"].torch_name,
        source_format=NAME,
    )
    return Assembly(config, pieces, _builder(layer, where), tuple(range(layer, n_layers)))


def _builder(layer: int, where: str) -> Build:
    def build(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: tensor for name, tensor in tensors.items() if name != "W_dec_norm"}
        stored = tensors.get("W_dec_norm")
        norms = tensors["W_dec"].float().flatten(1).norm(dim=1)
        if stored is not None and not torch.allclose(
            stored.float(), norms, rtol=_TOLERANCE, atol=1e-6, equal_nan=True
        ):
            raise CheckpointError(
                f"{where}: W_dec_norm_{layer} is not the norm of W_dec_{layer} over all layers "
                "written to, so the choice of features would not be the trained one"
            )
        return found

    return build


FORMATS = (
    Format(
        name=NAME,
        summary="W_enc_{i}, W_dec_{i}, W_dec_norm_{i}.safetensors, factors.safetensors",
        detect=_detect,
        open=open_joint_topk,
        options={
            "k": "features kept over all layers together (360 for ByteDance's)",
            "factors": "'ignore': read the weights although factors.safetensors is not applied",
            "input_site": "where it reads (default R)",
            "output_site": "where it writes (default O)",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, which the files do not hold",
        },
    ),
)

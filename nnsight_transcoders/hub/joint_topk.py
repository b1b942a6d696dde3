"""ByteDance's cross-layer transcoder with one TopK over all layers (``Cross-Layer-TopK-CLT``).

Per layer ``W_enc_{l} (F, d)`` and ``W_dec_{l} (F, N - l, d)``, whose ``j``-th slice writes to layer
``l + j``; no biases (``b_enc_{l}``, ``b_dec_{l}`` are read where there are some). A feature's
activation is weighed by the norm of all it writes, ``W_dec_norm_{l} (F)`` and all of them again as
``W_dec_norm (N, F)``, and the k largest of all layers together are kept (activation ``jointtopk``),
k being ``config.json``'s times N. From the raw residual stream to the MLP's output.

As its model card says: the scales of ``factors.safetensors`` (mean norms at either site) are folded
into the weights already and must not be applied again, and tokens with a norm of 20 times the mean
were left out in training, in practice the first one (``leading_positions=1``). Tensors are found by
name, whichever file they are in; stored norms are compared with those of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assembled import (
    AssembledSource,
    Assembly,
    Build,
    Header,
    Piece,
    check_file,
)
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_shape
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
CONFIG, FACTORS, NORMS = "config.json", "factors.safetensors", "W_dec_norm"

_FILE = re.compile(r"^(?:(?:W_enc|W_dec|W_dec_norm|b_enc|b_dec)_\d+|W_dec_norm)\.safetensors$")
_KEY = re.compile(r"^(?:W_enc|W_dec|W_dec_norm|b_enc|b_dec)_(\d+)$")
#: Mean norms at the two sites: what the card says ``FACTORS`` holds.
_FACTORS = ("resid_mid_l2", "mlp_out_l2")
#: How far stored norms may be from those of the weights (16-bit weights are rounded).
_TOLERANCE = 0.02


def is_joint_topk(snapshot: Snapshot) -> bool:
    """Whether the files show this layout rather than circuit-tracer's."""
    found = [name for name in snapshot.files if _FILE.match(name)]
    norms = any(name.startswith(NORMS) for name in found)
    return bool(found) and (norms or FACTORS in snapshot.files)


def _detect(snapshot: Snapshot) -> Evidence | None:
    if not is_joint_topk(snapshot):
        return None
    return Evidence(Strength.TENSOR_KEYS, f"W_dec_{{i}} with {NORMS} or {FACTORS}")


def open_joint_topk(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> AssembledSource:
    """Open a checkpoint in this layout; its config and the headers are read.

    Raises:
        CheckpointError: Files that are not as they should be, or no k.
        InputError: Only some of its layers are asked for.
    """
    _check_factors(snapshot)
    headers = snapshot.headers([name for name in snapshot.files if _FILE.match(name)])
    places = {key: file for file, header in headers.items() for key in header}
    numbers = sorted(
        int(match[1]) for key in places if (match := _KEY.match(key)) and "W_enc" in key
    )
    if not numbers or numbers != list(range(len(numbers))):
        raise CheckpointError(
            f"{snapshot.where} has W_enc_{{i}} for layers {numbers}; a cross-layer transcoder "
            "needs all of them from 0 on"
        )
    check_whole(numbers, choose_layers(numbers, layers, snapshot.where), snapshot.where)
    raw = snapshot.json(CONFIG) if CONFIG in snapshot.files else {}
    fields = {
        "k": _k(snapshot, raw, len(numbers), options.get("k")),
        "input_site": options.get("input_site", "R"),
        "output_site": options.get("output_site", "O"),
        "leading_positions": options.get("leading_positions", 1),
        "base_model": options.get("base_model"),
    }
    header = {key: headers[file][key] for key, file in places.items()}
    plans = {
        layer: _plan(snapshot, layer, len(numbers), places, header, fields) for layer in numbers
    }
    _check_width(snapshot, raw, plans[0].config.d_transcoder)
    for file, held in headers.items():
        pieces = [p for plan in plans.values() for p in plan.pieces.values() if p.file == file]
        check_file(f"{file} of {snapshot.where}", held, pieces)
    ignored = [FACTORS] if FACTORS in snapshot.files else []
    provenance = {"format": NAME, "config": raw, "folds": [], "ignored": ignored}
    return AssembledSource(snapshot, plans, provenance)


def _check_factors(snapshot: Snapshot) -> None:
    """What is left unread must be what the card says can be."""
    if FACTORS not in snapshot.files:
        return
    unknown = sorted(set(snapshot.header(FACTORS)) - set(_FACTORS))
    if unknown:
        raise CheckpointError(
            f"{FACTORS} of {snapshot.where} has {', '.join(unknown)}; known and already folded "
            f"into the weights are {' and '.join(_FACTORS)}. Reading the weights without the "
            "others could give wrong results"
        )


def _k(snapshot: Snapshot, raw: Mapping[str, Any], n_layers: int, given: int | None) -> int:
    """Features kept over all layers: the argument, or the config's, which is per layer."""
    if given is not None:
        return given
    k = raw.get("k")
    if type(k) is not int:
        raise CheckpointError(
            f"{snapshot.where}: no {CONFIG} says how many features are kept: pass k=... (over all "
            "layers together; 360 for ByteDance-Seed/Cross-Layer-TopK-CLT)"
        )
    return k * n_layers


def _check_width(snapshot: Snapshot, raw: Mapping[str, Any], width: int) -> None:
    stated = raw.get("d_feature", width)
    if stated != width:
        raise CheckpointError(
            f"{CONFIG} of {snapshot.where} says d_feature {stated}, but W_enc_0 has {width} "
            "features"
        )


def _plan(
    snapshot: Snapshot,
    layer: int,
    n_layers: int,
    places: Mapping[str, str],
    header: Header,
    fields: Mapping[str, Any],
) -> Assembly:
    width, d_in = tensor_shape(header, f"W_enc_{layer}", 2, snapshot.where)
    d_out = tensor_shape(header, f"W_dec_{layer}", 3, snapshot.where)[2]
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "W_enc": ((width, d_in), 0),
        "b_enc": ((width,), 0),
        "b_dec": ((d_out,), None),
        "W_dec": ((width, n_layers - layer, d_out), 0),
        NORMS: ((width,), 0),
    }
    pieces = {
        name: Piece(places[key], key, shape, features=axis)
        for name, (shape, axis) in shapes.items()
        if (key := f"{name}_{layer}") in places
    }
    if NORMS in places:
        shape = (n_layers, width)
        pieces["all_norms"] = Piece(places[NORMS], NORMS, shape, layer, features=0)
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_out,
        d_transcoder=width,
        layer=layer,
        activation="jointtopk",
        cross_layer=True,
        dtype=header[f"W_enc_{layer}"].torch_name,
        source_format=NAME,
        **fields,
    )
    build = _builder(layer, d_out, snapshot.where)
    return Assembly(config, pieces, build, tuple(range(layer, n_layers)))


def _builder(layer: int, d_out: int, where: str) -> Build:
    def build(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
        norms = W_dec.float().flatten(1).norm(dim=1)
        for name in (NORMS, "all_norms"):
            stored = tensors.get(name)
            if stored is not None and not torch.allclose(
                stored.float(), norms, rtol=_TOLERANCE, atol=1e-6, equal_nan=True
            ):
                raise CheckpointError(
                    f"{where}: {NORMS} of layer {layer} is not the norm of W_dec_{layer} over all "
                    "layers written to, so the choice of features would not be the trained one"
                )
        none = {"b_enc": W_enc.new_zeros(len(W_enc)), "b_dec": W_enc.new_zeros(d_out)}
        found = {name: tensors.get(name, zeros) for name, zeros in none.items()}
        return {"W_enc": W_enc, "W_dec": W_dec, **found}

    return build


FORMATS = (
    Format(
        name=NAME,
        summary="W_enc_{i}, W_dec_{i}.safetensors with W_dec_norm.safetensors, config.json",
        detect=_detect,
        open=open_joint_topk,
        options={
            "k": "features kept over all layers together (default: config.json's times layers)",
            "input_site": "where it reads (default R)",
            "output_site": "where it writes (default O)",
            "leading_positions": "positions left out at the start (default 1)",
            "base_model": "the model's Hub id",
        },
    ),
)

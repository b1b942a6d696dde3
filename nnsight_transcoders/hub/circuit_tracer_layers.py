"""The per-layer files of circuit-tracer's layout: which tensor is where, and what it means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.formats import choose_layers
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, check_header
from nnsight_transcoders.hub.tensors import TensorInfo, open_tensors
from nnsight_transcoders.transcoder import TranscoderConfig

CONFIG = "config.yaml"
LAYER_FILE = re.compile(r"^layer_(\d+)\.safetensors$")

#: ``decoder_layout=``: whether ``W_dec`` holds one feature per column.
LAYOUTS = {"rows": False, "columns": True}
_THRESHOLDS = ("activation_function.threshold", "threshold")
_ACTIVATIONS = {"relu": "relu", "topk": "topk", "jumprelu": "jumprelu", "jump_relu": "jumprelu"}

Header = Mapping[str, TensorInfo]


def plan_layers(
    snapshot: Snapshot,
    raw: Mapping[str, Any],
    layers: Sequence[int] | None,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[int, LayerPlan]:
    """What each layer is and where its tensors are, from ``config.yaml`` and the headers."""
    files = _layer_files(snapshot, raw)
    chosen = choose_layers(files, layers, snapshot.where)
    headers = snapshot.headers([files[layer] for layer in chosen])
    plans = {}
    for layer in chosen:
        file, header = files[layer], headers[files[layer]]
        where = f"{file} of {snapshot.where}"
        width, d_out = tensor_length(header, "b_enc", where), tensor_length(header, "b_dec", where)
        refs = {name: TensorRef(file, name) for name in ("W_enc", "b_enc", "b_dec")}
        columns = _decoder_columns(header, width, d_out, options.get("decoder_layout"), where)
        refs["W_dec"] = TensorRef(file, "W_dec", transposed=columns)
        refs |= {"W_skip": TensorRef(file, "W_skip")} if "W_skip" in header else {}
        found = [key for key in _THRESHOLDS if key in header]
        refs |= {"threshold": TensorRef(file, found[0])} if found else {}
        activation = _activation(raw, "threshold" in refs, where)
        config = TranscoderConfig(
            d_in=tensor_shape(header, "W_enc", 2, where)[1],
            d_out=d_out,
            d_transcoder=width,
            layer=layer,
            activation=activation,
            k=_k(snapshot, raw, options, file, header) if activation == "topk" else None,
            relu_first=activation != "topk",
            skip="W_skip" in refs,
            dtype=header["W_enc"].torch_name,
            **fields,
        )
        plans[layer] = LayerPlan(config, refs, ignored=("k",))
        check_header(where, file, header, plans[layer])
    return plans


def _layer_files(snapshot: Snapshot, raw: Mapping[str, Any]) -> dict[int, str]:
    listed = raw.get("transcoders")
    if listed and not isinstance(listed, list):
        raise CheckpointError(f"{CONFIG} of {snapshot.where}: transcoders should be a list")
    if listed:
        files = dict(enumerate(map(str, listed)))
    else:
        found = ((match, name) for name in snapshot.files if (match := LAYER_FILE.match(name)))
        files = {int(match[1]): name for match, name in found}
    if not files:
        raise CheckpointError(
            f"{snapshot.where} has no layer_{{i}}.safetensors; it has {snapshot.listing()}"
        )
    return files


def tensor_shape(header: Header, key: str, dimensions: int, where: str) -> tuple[int, ...]:
    """A tensor's shape, which must have so many dimensions.

    Raises:
        CheckpointError: It is not there, or has another number of dimensions.
    """
    if key not in header:
        raise CheckpointError(f"{where} has no tensor {key}; it has {', '.join(sorted(header))}")
    shape = header[key].shape
    if len(shape) != dimensions:
        raise CheckpointError(
            f"{where}: tensor {key} has shape {shape}, expected {dimensions} dimension(s)"
        )
    return shape


def tensor_length(header: Header, key: str, where: str) -> int:
    return tensor_shape(header, key, 1, where)[0]


def _decoder_columns(
    header: Header, width: int, d_out: int, layout: str | None, where: str
) -> bool:
    """Whether ``W_dec`` holds one feature per column; the biases tell rows from columns."""
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"decoder_layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    shape = tensor_shape(header, "W_dec", 2, where)
    fits = [name for name, columns in LAYOUTS.items() if shape == _oriented(width, d_out, columns)]
    if not fits or (layout is not None and layout not in fits):
        raise CheckpointError(
            f"{where}: W_dec has shape {shape}, expected {(width, d_out)} from b_enc and b_dec"
            + (f" with decoder_layout={layout!r}" if layout else f" or {(d_out, width)}")
        )
    if len(fits) > 1 and layout is None:
        raise CheckpointError(
            f"{where}: W_dec is square ({shape}), so its shape does not say whether features are "
            "rows or columns; pass decoder_layout='rows' or decoder_layout='columns'"
        )
    return LAYOUTS[layout or fits[0]]


def _oriented(width: int, d_out: int, columns: bool) -> tuple[int, int]:
    return (d_out, width) if columns else (width, d_out)


def _activation(raw: Mapping[str, Any], has_threshold: bool, where: str) -> str:
    named = raw.get("activation")
    if named is None:
        return "jumprelu" if has_threshold else "relu"
    activation = _ACTIVATIONS.get(str(named).lower())
    if activation is None:
        raise CheckpointError(
            f"{CONFIG} names the activation {named!r}; known: {', '.join(_ACTIVATIONS)}"
        )
    if (activation == "jumprelu") != has_threshold:
        raise CheckpointError(
            f"{CONFIG} names the activation {named!r}, but {where} has "
            f"{'a' if has_threshold else 'no'} threshold"
        )
    return activation


def _k(
    snapshot: Snapshot,
    raw: Mapping[str, Any],
    options: Mapping[str, Any],
    file: str,
    header: Header,
) -> int:
    """k from the argument, the config, or the file (newer files hold it as a tensor)."""
    k = options.get("k")
    k = raw.get("k") if k is None else k
    if k is None and "k" in header:
        with open_tensors(snapshot.path(file)) as handle:
            stored = handle.get_tensor("k")
        k = int(stored) if stored.numel() == 1 and stored.isfinite().all() else None
    if not isinstance(k, int):
        raise CheckpointError(
            f"{snapshot.where} uses TopK, but neither {CONFIG} nor the files say k as a "
            "number: pass k=... "
            "(128 for facebook/crv-8b-instruct-transcoders)"
        )
    return k

"""The layout of ``sackfield/qwen2.5-0.5b-transcoders``: a JSON file beside every layer's weights.

``layer_{L}.safetensors`` holds ``W_enc (d, F)``, ``b_enc``, ``W_dec (F, d)``, ``b_dec``, a
``threshold`` per feature where it is a JumpReLU, and a skip path ``W_skip (d_out, d_in)`` applied
as ``x @ W_skip.T`` where it has one. It reads the MLP's input and writes its output (sites N1 and
O). Read from the repository's model card; the keys of ``layer_{L}.json`` are not documented there,
so those that could contradict the tensors are compared with them, and all are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assembled import Header
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_length, tensor_shape
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, choose_layers
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "sackfield"

_FILE = re.compile(r"^layer_(\d+)\.safetensors$")
#: What the JSON may say about the sizes: our field -> its possible keys.
_SIZES = {
    "d_in": ("d_in", "d_model"),
    "d_transcoder": ("d_transcoder", "d_sae", "d_hidden", "n_features", "num_features"),
    "d_out": ("d_out",),
    "layer": ("layer",),
}
_ACTIVATION_KEYS = ("activation", "activation_fn", "act_fn")


def layer_files(snapshot: Snapshot) -> dict[int, str]:
    """Layer -> weights file, of the layers that have a JSON file beside it."""
    found = ((match, name) for name in snapshot.files if (match := _FILE.match(name)))
    return {
        int(match[1]): name for match, name in found if f"layer_{match[1]}.json" in snapshot.files
    }


def _detect(snapshot: Snapshot) -> Evidence | None:
    files = layer_files(snapshot)
    if not files:
        return None
    first = files[min(files)]
    return Evidence(Strength.LAYER_CONFIG, f"{first} with a .json beside it")


def open_sackfield(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open a set in this layout; headers and the JSON files are read.

    Raises:
        CheckpointError: A file that is not as it should be, or a JSON that contradicts it.
    """
    files = layer_files(snapshot)
    if not files:
        raise CheckpointError(
            f"{snapshot.where} has no layer_{{i}}.safetensors with layer_{{i}}.json beside it; it "
            f"has {snapshot.listing()}"
        )
    chosen = choose_layers(files, layers, snapshot.where)
    headers = snapshot.headers([files[layer] for layer in chosen])
    raws = {layer: snapshot.json(f"layer_{layer}.json") for layer in chosen}
    plans = {}
    for layer in chosen:
        file = files[layer]
        where = f"{file} of {snapshot.where}"
        plans[layer] = _plan(layer, file, headers[file], raws[layer], where, options)
        check_header(where, file, headers[file], plans[layer])
    config = {str(layer): raw for layer, raw in raws.items()}
    return TensorSource(snapshot, plans, {"format": NAME, "config": config})


def _plan(
    layer: int,
    file: str,
    header: Header,
    raw: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any],
) -> LayerPlan:
    d_in, width = tensor_shape(header, "W_enc", 2, where)
    sizes = {
        "d_in": d_in,
        "d_transcoder": width,
        "d_out": tensor_length(header, "b_dec", where),
        "layer": layer,
    }
    _check_sizes(raw, sizes, where)
    refs = {
        "W_enc": TensorRef(file, "W_enc", transposed=True),
        **{name: TensorRef(file, name) for name in ("b_enc", "W_dec", "b_dec")},
        **{name: TensorRef(file, name) for name in ("W_skip", "threshold") if name in header},
    }
    config = TranscoderConfig(
        d_in=sizes["d_in"],
        d_out=sizes["d_out"],
        d_transcoder=sizes["d_transcoder"],
        layer=layer,
        activation=_activation(raw, "threshold" in refs, where),
        skip="W_skip" in refs,
        input_site=options.get("input_site", "N1"),
        output_site=options.get("output_site", "O"),
        leading_positions=options.get("leading_positions", 0),
        base_model=raw.get("model_name") or options.get("base_model"),
        dtype=header["W_enc"].torch_name,
        source_format=NAME,
        extra=dict(raw),
    )
    return LayerPlan(config, refs)


def _check_sizes(raw: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    for name, keys in _SIZES.items():
        for key in keys:
            if raw.get(key) not in (None, sizes[name]):
                raise CheckpointError(
                    f"{where} has {name}={sizes[name]}, but its JSON says {key}={raw[key]!r}"
                )


def _activation(raw: Mapping[str, Any], has_threshold: bool, where: str) -> str:
    found = "jumprelu" if has_threshold else "relu"
    for key in _ACTIVATION_KEYS:
        named = str(raw.get(key) or found).lower().replace("_", "").replace("-", "")
        if "relu" not in named or ("jump" in named) != has_threshold:
            raise CheckpointError(
                f"the JSON beside {where} has {key}={raw[key]!r}, but the file has "
                f"{'a' if has_threshold else 'no'} threshold, which makes it {found!r}"
            )
    return found


FORMATS = (
    Format(
        name=NAME,
        summary="layer_{i}.safetensors with layer_{i}.json beside it",
        detect=_detect,
        open=open_sackfield,
        options={
            "input_site": "where it reads (default N1)",
            "output_site": "where it writes (default O)",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, where the JSON does not hold it",
        },
    ),
)

"""circuit-tracer's checkpoint layouts: per-layer and cross-layer, with a ``config.yaml``.

Per layer: ``layer_{i}.safetensors`` with ``W_enc (F, d)``, ``b_enc``, ``W_dec``, ``b_dec``, and
``W_skip`` (applied as ``x @ W_skip.T``) or ``activation_function.threshold`` where there is one.
``W_dec`` is ``(F, d)`` in newer files and ``(d, F)`` in older ones: the biases' lengths decide.
Cross-layer: ``W_enc_{i}.safetensors`` with ``W_enc_{i}, b_enc_{i}, b_dec_{i}`` and perhaps
``threshold_{i}``, ``W_dec_{i}.safetensors`` with ``W_dec_{i} (F, n_layers - i, d)``, whose ``j``-th
slice writes to layer ``i + j``; a ``W_skip_{i} (d, d)`` beside ``W_enc_{i}`` is layer ``i``'s skip
path. Files of other repositories that ``config.yaml`` refers to: ``references``.

circuit-tracer leaves out the features of position 0 (for instruction-tuned Gemma 3, of the first
four), so sets in this layout do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.circuit_tracer_layers import (
    CONFIG,
    LAYER_FILE,
    plan_layers,
    tensor_length,
    tensor_shape,
)
from nnsight_transcoders.hub.circuit_tracer_save import KINDS, save_circuit_tracer
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, check_whole, choose_layers
from nnsight_transcoders.hub.joint_topk import is_joint_topk
from nnsight_transcoders.hub.references import has_references, open_references
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.layer_sources import LayerSource
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "circuit-tracer"

_KEYS = {
    "model_name",
    "model_kind",
    "feature_input_hook",
    "feature_output_hook",
    "transcoders",
    "activation",
    "k",
}
_ENCODER = re.compile(r"^W_enc_(\d+)\.safetensors$")


def _detect(snapshot: Snapshot) -> Evidence | None:
    if is_joint_topk(snapshot):
        return None
    if CONFIG in snapshot.files:
        found = sorted(_KEYS & set(read_config(snapshot)))
        if found:
            return Evidence(Strength.CONFIG_YAML, f"{CONFIG} with {', '.join(found)}")
    for name in snapshot.files:
        if LAYER_FILE.match(name) or _ENCODER.match(name):
            return Evidence(Strength.FILE_NAMES, name)
    return None


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """``config.yaml``, or nothing where there is none."""
    if snapshot.complete and CONFIG not in snapshot.files:
        return {}
    try:
        raw = yaml.safe_load(snapshot.text(CONFIG))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{CONFIG} of {snapshot.where} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{CONFIG} of {snapshot.where} should hold a mapping")
    return {str(key): value for key, value in raw.items()}


def open_circuit_tracer(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> LayerSource:
    """Open a checkpoint in circuit-tracer's layout; headers and ``config.yaml`` are read.

    Raises:
        CheckpointError: What the files do not say and no option settles, or a file that is not
            as it should be.
        ConfigError: An option with a value it cannot have.
    """
    raw = read_config(snapshot)
    kind = raw.get("model_kind") or (
        KINDS[1] if any(map(_ENCODER.match, snapshot.files)) else KINDS[0]
    )
    if kind not in KINDS:
        raise CheckpointError(
            f"{CONFIG} of {snapshot.where} has model_kind {kind!r}; known: {', '.join(KINDS)}"
        )
    fields = _common_fields(raw, snapshot, options)
    if has_references(raw):
        if kind == KINDS[1]:
            raise CheckpointError(
                f"{CONFIG} of {snapshot.where} lists files of other repositories, which only a "
                "per-layer set can"
            )
        return open_references(snapshot, raw, layers, fields, options)
    if kind == KINDS[0]:
        plans = plan_layers(snapshot, raw, layers, fields, options)
    else:
        plans = _plan_cross_layer(snapshot, layers, fields, options)
    return TensorSource(snapshot, plans, {"format": NAME, "config": raw})


def _common_fields(
    raw: Mapping[str, Any], snapshot: Snapshot, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The config fields that all layers share: sites, positions, model."""
    where = f"{CONFIG} of {snapshot.where}" if raw else f"{snapshot.where} (it has no {CONFIG})"
    return {
        "input_site": options.get("input_site")
        or hooks.input_site(raw.get("feature_input_hook"), where),
        "output_site": options.get("output_site")
        or hooks.output_site(raw.get("feature_output_hook"), where),
        "leading_positions": options.get("leading_positions", _leading_positions(raw)),
        "base_model": raw.get("model_name"),
        "source_format": NAME,
        "extra": {key: value for key, value in raw.items() if key not in _KEYS},
    }


def _leading_positions(raw: Mapping[str, Any]) -> int:
    """How many circuit-tracer leaves out: for instruction-tuned Gemma 3, the turn's start, too."""
    model = str(raw.get("model_name")).lower()
    return 4 if "gemma-3-" in model and model.endswith("-it") else 1


def _plan_cross_layer(
    snapshot: Snapshot,
    layers: Sequence[int] | None,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[int, LayerPlan]:
    unused = sorted({"k", "decoder_layout"} & set(options))
    if unused:
        raise ConfigError(f"{', '.join(unused)}: for per-layer sets; {snapshot.where} is not one")
    matches = (_ENCODER.match(name) for name in snapshot.files)
    available = sorted(int(match[1]) for match in matches if match)
    if not available or available != list(range(len(available))):
        raise CheckpointError(
            f"{snapshot.where} has W_enc_{{i}}.safetensors for layers {available}; a cross-layer "
            "transcoder needs all of them from 0 on"
        )
    check_whole(available, choose_layers(available, layers, snapshot.where), snapshot.where)
    encoders = [f"W_enc_{layer}.safetensors" for layer in available]
    decoders = [f"W_dec_{layer}.safetensors" for layer in available]
    headers = snapshot.headers(encoders + decoders)
    plans = {}
    for layer, encoder, decoder in zip(available, encoders, decoders, strict=True):
        header, where = headers[encoder], f"{encoder} of {snapshot.where}"
        names = ["W_enc", "b_enc", "b_dec"]
        names += [name for name in ("threshold", "W_skip") if f"{name}_{layer}" in header]
        refs = {name: TensorRef(encoder, f"{name}_{layer}") for name in names}
        refs["W_dec"] = TensorRef(decoder, f"W_dec_{layer}")
        config = TranscoderConfig(
            d_in=tensor_shape(header, f"W_enc_{layer}", 2, where)[1],
            d_out=tensor_length(header, f"b_dec_{layer}", where),
            d_transcoder=tensor_length(header, f"b_enc_{layer}", where),
            layer=layer,
            activation="jumprelu" if "threshold" in refs else "relu",
            skip="W_skip" in refs,
            cross_layer=True,
            dtype=header[f"W_enc_{layer}"].torch_name,
            **fields,
        )
        plans[layer] = LayerPlan(config, refs, tuple(range(layer, len(available))))
        for file in (encoder, decoder):
            check_header(f"{file} of {snapshot.where}", file, headers[file], plans[layer])
    return plans


FORMATS = (
    Format(
        name=NAME,
        summary="config.yaml and layer_{i}.safetensors, or W_enc_{i} and W_dec_{i}.safetensors",
        detect=_detect,
        open=open_circuit_tracer,
        save=save_circuit_tracer,
        options={
            "k": "features kept by TopK, where no file says so",
            "decoder_layout": "'rows' or 'columns': where W_dec is square",
            "input_site": "overrides feature_input_hook",
            "output_site": "overrides feature_output_hook",
            "leading_positions": "positions left out at the start (default 1)",
        },
    ),
)

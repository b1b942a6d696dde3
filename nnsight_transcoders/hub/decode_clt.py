"""decode-clt (``crosslayer-coding``): cross-layer transcoders in one safetensors file.

``cfg.json`` (``num_layers``, ``num_features``, ``d_model``, ``activation_fn``, ``decoder_tying``)
beside one weights file with ``encoder_module.encoders.{i}.weight (F, d)`` and ``.bias_param``,
``decoder_module.decoders.{key}.weight (d, F)`` and ``.bias_param``, and for JumpReLU
``theta_manager.log_threshold (L, F)``. The key is ``"s->t"`` for every pair of layers, ``"s"`` with
``decoder_tying: per_source``, ``"t"`` with ``per_target``. Every decoder adds its bias, so that a
layer's bias is the sum over the layers that write to it (one, with ``per_target``). Read from its
``clt/models`` and ``clt/config/clt_config.py``.

Activations normalised in training are folded in: ``sqrt_d_model`` (``x * sqrt(d)``, both sides), or
``mean_std`` with the ``norm_stats.json`` that was kept (``(x - mean) / std`` on either side).
TopK and BatchTopK are refused: they choose by values normalised over the batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.assembled import AssembledSource, Assembly, Header, check_file
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_shape
from nnsight_transcoders.hub.decode_clt_parts import LOG_THRESHOLD, Layout, builder, layer_pieces
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    check_whole,
    choose_layers,
)
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "decode-clt"
CONFIG, STATISTICS = "cfg.json", "norm_stats.json"

_ENCODER = re.compile(r"^encoder_module\.encoders\.\d+\.weight$")
_SIZES = ("num_layers", "num_features", "d_model")
_NORMALISATIONS = {
    "none": "none",
    "mean_std": "mean_std",
    "auto": "mean_std",
    "estimated_mean_std": "mean_std",
    "sqrt_d_model": "sqrt_d_model",
    "auto_sqrt_d_model": "sqrt_d_model",
    "estimated_mean_std_sqrt_d_model": "sqrt_d_model",
}
_TYINGS = ("none", "per_source", "per_target")


def _config_files(snapshot: Snapshot) -> list[str]:
    """The configs with a weights file beside them."""
    paths = [PurePosixPath(name) for name in snapshot.files]
    weights = {path.parent for path in paths if path.suffix == ".safetensors"}
    return [str(path) for path in paths if path.name == CONFIG and path.parent in weights]


def _is_beside(name: str, other: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".safetensors" and path.parent == PurePosixPath(other).parent


def _detect(snapshot: Snapshot) -> Evidence | None:
    found = _config_files(snapshot)
    wanted = {"num_features", "num_layers", "activation_fn"}
    if not found or not wanted <= set(snapshot.json(found[0])):
        return None
    seen = f"{found[0]} with num_features, num_layers and activation_fn"
    return Evidence(Strength.LAYER_CONFIG, seen)


def open_decode_clt(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> AssembledSource:
    """Open a checkpoint in this layout; its config and header are read.

    Raises:
        CheckpointError: A config that has no place here, or a file that contradicts it.
        ConfigError: An option with a value it cannot have.
        InputError: Only some of its layers are asked for.
    """
    config_file = _choose(snapshot, options.get("folder"))
    raw, where = snapshot.json(config_file), f"{config_file} of {snapshot.where}"
    file = _weights(snapshot, config_file)
    _check_config(raw, where)
    header = snapshot.header(file)
    _check_sizes(raw, header, f"{file} of {snapshot.where}")
    numbers = range(raw["num_layers"])
    check_whole(numbers, choose_layers(numbers, layers, snapshot.where), snapshot.where)
    normalisation, statistics = _normalisation(snapshot, config_file, raw, options)
    layout = Layout(
        file, raw["num_layers"], raw["num_features"], raw["d_model"], raw, normalisation
    )
    fields = _fields(raw, where, options)
    plans = {}
    for layer in numbers:
        pieces = layer_pieces(layout, layer)
        stored = header.get(pieces["W_enc"].key)
        dtype = "float32" if stored is None else stored.torch_name
        config = TranscoderConfig(layer=layer, dtype=dtype, **fields)
        build = builder(layout, layer, statistics, where)
        plans[layer] = Assembly(config, pieces, build, tuple(numbers[layer:]))
    every = [piece for plan in plans.values() for piece in plan.pieces.values()]
    ignored = () if raw["activation_fn"] == "jumprelu" else (LOG_THRESHOLD,)
    check_file(f"{file} of {snapshot.where}", header, every, ignored)
    folds = [] if normalisation == "none" else [f"normalisation {normalisation}"]
    return AssembledSource(snapshot, plans, {"format": NAME, "config": raw, "folds": folds})


def _weights(snapshot: Snapshot, config_file: str) -> str:
    """The one weights file beside a config."""
    found = [name for name in snapshot.files if _is_beside(name, config_file)]
    if len(found) != 1:
        raise CheckpointError(
            f"{snapshot.where}: expected one .safetensors file beside {config_file}, found "
            f"{', '.join(found) or 'none'}"
        )
    return found[0]


def _choose(snapshot: Snapshot, folder: str | None) -> str:
    """The config file of the set that is meant."""
    every = found = _config_files(snapshot)
    if folder is not None:
        found = [name for name in every if str(PurePosixPath(name).parent) == folder.strip("/")]
    if len(found) == 1:
        return found[0]
    known = sorted(str(PurePosixPath(name).parent) for name in every)
    raise CheckpointError(
        f"{snapshot.where} has {len(found)} folders with {CONFIG} and weights; say which with "
        f"folder=, one of {', '.join(known) or 'none'}"
    )


def _check_config(raw: Mapping[str, Any], where: str) -> None:
    for key in _SIZES:
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise CheckpointError(f"{where}: {key} must be a positive number, got {raw.get(key)!r}")
    name = raw.get("activation_fn")
    if name in ("topk", "batchtopk"):
        raise CheckpointError(
            f"{where}: activation_fn {name!r} chooses features by values normalised over the "
            "batch, so that a token's features depend on the other tokens; it is not read. "
            "decode-clt's convert_to_jumprelu_inplace makes a checkpoint that is"
        )
    if name not in ("relu", "jumprelu"):
        raise CheckpointError(f"{where}: activation_fn {name!r} is not known")
    if raw.get("decoder_tying", "none") not in _TYINGS:
        raise CheckpointError(
            f"{where}: decoder_tying {raw['decoder_tying']!r} is not known; known: "
            f"{', '.join(_TYINGS)}"
        )
    for key in ("enable_feature_offset", "enable_feature_scale"):
        if raw.get(key):
            raise CheckpointError(f"{where} has {key}, which has no place in this package")
    if raw.get("skip_connection") and raw.get("decoder_tying", "none") == "none":
        raise CheckpointError(
            f"{where} has skip paths from each layer to all later ones, which have no place here"
        )


def _check_sizes(raw: Mapping[str, Any], header: Header, where: str) -> None:
    """Compare the config's sizes with the tensors', before anything is made of that size."""
    encoders = [key for key in header if _ENCODER.match(key)]
    if len(encoders) != raw["num_layers"]:
        raise CheckpointError(
            f"{where} has {len(encoders)} encoders, but {CONFIG} says num_layers="
            f"{raw['num_layers']}"
        )
    expected = (raw["num_features"], raw["d_model"])
    for key in sorted(encoders):
        shape = tensor_shape(header, key, 2, where)
        if shape != expected:
            raise CheckpointError(
                f"{where}: tensor {key} has shape {shape}, expected {expected} from {CONFIG}"
            )


def _normalisation(
    snapshot: Snapshot, config_file: str, raw: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """How activations were normalised, and the statistics where that takes them."""
    where = f"{config_file} of {snapshot.where}"
    beside = str(PurePosixPath(config_file).parent / STATISTICS)
    files = [name for name in (beside, STATISTICS) if name in snapshot.files]
    given = options.get("normalization")
    if given is not None and given not in _NORMALISATIONS:
        raise ConfigError(
            f"normalization must be one of {', '.join(_NORMALISATIONS)}, got {given!r}"
        )
    named = given or raw.get("normalization_method", "none")
    if raw.get("sqrt_d_model_normalize") and given is None:
        named = "sqrt_d_model"
    if named not in _NORMALISATIONS:
        raise CheckpointError(f"{where}: normalization_method {named!r} is not known")
    method = _NORMALISATIONS[named]
    if method == "none" and files and given is None:
        raise CheckpointError(
            f"{where} names no normalisation, but there is {files[0]}: pass "
            "normalization='mean_std' to fold it in, or normalization='none'"
        )
    if method == "mean_std" and not files:
        raise CheckpointError(
            f"{where} was trained on normalised activations, and {STATISTICS} with their means "
            "and deviations is missing: without it the weights mean nothing"
        )
    return method, snapshot.json(files[0]) if method == "mean_std" else {}


def _fields(raw: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "d_in": raw["d_model"],
        "d_out": raw["d_model"],
        "d_transcoder": raw["num_features"],
        "activation": raw["activation_fn"],
        "input_site": options.get("input_site")
        or hooks.input_site(raw.get("tl_input_template"), where),
        "output_site": options.get("output_site")
        or hooks.output_site(raw.get("tl_output_template"), where),
        "skip": bool(raw.get("skip_connection")),
        "cross_layer": True,
        "leading_positions": options.get("leading_positions", 0),
        "base_model": raw.get("model_name") if isinstance(raw.get("model_name"), str) else None,
        "source_format": NAME,
        "extra": dict(raw),
    }


FORMATS = (
    Format(
        name=NAME,
        summary="cfg.json (num_layers, num_features) and one file with encoder_module.encoders",
        detect=_detect,
        open=open_decode_clt,
        options={
            "folder": "which set, where a repository holds several",
            "normalization": "'none', 'mean_std' or 'sqrt_d_model', over the config",
            "input_site": "where it reads, over the config's hook",
            "output_site": "where it writes, over the config's hook",
            "leading_positions": "positions left out at the start (default 0)",
        },
    ),
)

"""This package's own checkpoint layout: one JSON file, one safetensors file per layer.

``config.json`` holds ``format``, ``format_version``, ``kind``, the config of each layer, the
targets of a cross-layer set, metrics, and where the weights came from. ``layer_{i}.safetensors``
holds ``W_enc, b_enc, W_dec, b_dec`` and, where the config says so, ``W_skip`` and ``threshold``,
all in the canonical form (one row per feature), so that single rows can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.hub.card import MARKER, clean_metrics, make_card
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    check_whole,
    choose_layers,
)
from nnsight_transcoders.hub.snapshot import LocalSnapshot, Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource
from nnsight_transcoders.hub.staging import canonical_tensors, staged, write_json, write_tensors
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import CrossLayerPart, TranscoderConfig, dtype_name

NAME = "nnsight-transcoders"
VERSION = 1
CONFIG = "config.json"
KINDS = ("per-layer", "cross-layer")

_KEYS = {
    "format": True,
    "format_version": True,
    "kind": True,
    "layers": True,
    "targets": False,
    "base_model": False,
    "metrics": False,
    "provenance": False,
    "library_version": False,
}


# -- opening -----------------------------------------------------------------------------------


def _detect(snapshot: Snapshot) -> Evidence | None:
    if CONFIG in snapshot.files and snapshot.json(CONFIG).get("format") == NAME:
        return Evidence(Strength.NATIVE, f'{CONFIG} with "format": "{NAME}"')
    return None


def open_native(snapshot: Snapshot, layers: Sequence[int] | None = None) -> TensorSource:
    """Open a checkpoint in this package's layout; only ``config.json`` is read.

    Raises:
        CheckpointError: The config is not valid, or a layer's file is missing.
    """
    raw = snapshot.json(CONFIG)
    where = f"{CONFIG} of {snapshot.where}"
    _check_config(raw, where)
    configs = {int(key): _layer_config(key, data, where) for key, data in raw["layers"].items()}
    chosen = choose_layers(configs, layers, snapshot.where)
    cross_layer = raw["kind"] == "cross-layer"
    if cross_layer:
        check_whole(configs, chosen, snapshot.where)
    plans = {}
    for layer in chosen:
        snapshot.require(layer_file(layer))
        config = configs[layer]
        if config.cross_layer != cross_layer:
            raise CheckpointError(f"{where}: layer {layer} does not fit kind {raw['kind']!r}")
        refs = {name: TensorRef(layer_file(layer), name) for name in tensor_names(config)}
        plans[layer] = LayerPlan(config, refs, _targets(raw, layer, where))
    return TensorSource(snapshot, plans, {"format": NAME, "config": raw})


def layer_file(layer: int) -> str:
    """The file of a layer."""
    return f"layer_{layer}.safetensors"


def tensor_names(config: TranscoderConfig) -> tuple[str, ...]:
    """The tensors a layer has, from its config."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    names += ("W_skip",) if config.skip else ()
    return names + (("threshold",) if config.activation in ("jumprelu", "batchtopk") else ())


def _check_config(raw: Mapping[str, Any], where: str) -> None:
    if raw.get("format") != NAME:
        raise CheckpointError(f'{where} does not have "format": "{NAME}"; is it another format?')
    missing = sorted(key for key, needed in _KEYS.items() if needed and key not in raw)
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    if raw["format_version"] not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{where} has format_version {raw['format_version']!r}; this is nnsight-transcoders "
            f"{__version__}, which reads up to {VERSION}. Install a newer one"
        )
    unknown = sorted(set(raw) - set(_KEYS))
    if unknown:
        raise CheckpointError(
            f"{where} has unknown key(s) {', '.join(unknown)}; known: {', '.join(_KEYS)}"
        )
    if raw["kind"] not in KINDS:
        raise CheckpointError(f"{where} has kind {raw['kind']!r}; known: {', '.join(KINDS)}")
    layers = raw["layers"]
    if not isinstance(layers, dict) or not layers or not all(key.isdecimal() for key in layers):
        raise CheckpointError(f'{where}: "layers" must map layer numbers to configs')


def _layer_config(key: str, data: Any, where: str) -> TranscoderConfig:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: layer {key} has no config")
    try:
        config = TranscoderConfig.from_dict(data)
    except ConfigError as error:
        raise CheckpointError(f"{where}: layer {key}: {error}") from error
    if config.layer != int(key):
        raise CheckpointError(f"{where}: layer {key} has the config of layer {config.layer}")
    return config


def _targets(raw: Mapping[str, Any], layer: int, where: str) -> tuple[int, ...] | None:
    if raw["kind"] != "cross-layer":
        return None
    expected = sorted(target for target in map(int, raw["layers"]) if target >= layer)
    found = (raw.get("targets") or {}).get(str(layer))
    if found != expected:
        raise CheckpointError(
            f"{where}: layer {layer} writes to layers {found}, expected {expected}: itself and "
            "all later ones"
        )
    return tuple(expected)


# -- saving ------------------------------------------------------------------------------------


def save_set(
    transcoders: TranscoderSet,
    folder: str | Path,
    *,
    metrics: Mapping[Any, Any] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a set in this package's layout, with a model card.

    One layer is in memory at a time. Nothing of an earlier checkpoint in the folder changes until
    everything is written.

    Args:
        transcoders: The set; it is saved in the dtype in which it hands out its layers.
        folder: Where to; made if it is not there.
        metrics: What is known of its quality: a mapping per layer number (``{3: {"l0": 40.0,
            "fvu": 0.2}}``) and any other values of the whole set. Kept in the config and shown in
            the card.
        license: Licence of the weights, as the Hub names it.
        repo_id: The Hub id it will have, for the card.

    Returns:
        The folder.

    Raises:
        InputError: The folder holds another kind of checkpoint, or cannot be written.
        CheckpointError: A weight is NaN or infinite, or a layer cannot be loaded.
    """
    folder = Path(folder)
    stale = _earlier_layers(folder) - {layer_file(layer) for layer in transcoders.layers}
    config: dict[str, Any] = {
        "format": NAME,
        "format_version": VERSION,
        "kind": KINDS[transcoders.cross_layer],
        "base_model": transcoders.config(transcoders.layers[0]).base_model,
        "layers": {},
        "metrics": clean_metrics(metrics),
        "provenance": _lineage(transcoders.provenance),
        "library_version": __version__,
    }
    if transcoders.cross_layer:
        config["targets"] = {str(n): list(transcoders.targets(n)) for n in transcoders.layers}
    with staged(folder, last=CONFIG) as stage:
        for layer in transcoders.layers:
            config["layers"][str(layer)] = _write_layer(transcoders, layer, stage).to_dict()
        write_json(stage / CONFIG, config)
        if _may_write_card(folder / "README.md"):
            card = make_card(config, license=license, repo_id=repo_id)
            (stage / "README.md").write_text(card, encoding="utf-8")
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return folder


def _write_layer(transcoders: TranscoderSet, layer: int, stage: Path) -> TranscoderConfig:
    """Write one layer and let go of it; returns the config of what was really written."""
    module = transcoders.load(layer)
    config = module.config.replace(
        dtype=dtype_name(module.W_enc.dtype),
        cross_layer=isinstance(module, CrossLayerPart),
    )
    metadata = {"library": NAME, "format_version": str(VERSION), "layer": str(layer)}
    write_tensors(stage / layer_file(layer), canonical_tensors(module), metadata)
    return config


def _earlier_layers(folder: Path) -> set[str]:
    """The layer files of a native checkpoint that is already there."""
    path = folder / CONFIG
    if not path.exists():
        return set()
    try:
        raw = LocalSnapshot(folder).json(CONFIG)
    except CheckpointError as error:
        raise InputError(f"{path} is in the way and cannot be read: {error}") from error
    if raw.get("format") != NAME:
        raise InputError(
            f"{folder} holds a {CONFIG} of something else, which saving would overwrite; choose "
            "another folder"
        )
    return {layer_file(int(key)) for key in raw.get("layers", {}) if str(key).isdecimal()}


def _may_write_card(path: Path) -> bool:
    """A card that its author has taken over (by deleting the marker line) is left alone."""
    return not path.exists() or MARKER in path.read_text(encoding="utf-8", errors="replace")


def _lineage(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Where the weights first came from, without the paths of this machine."""
    if provenance.get("format") == NAME:
        earlier = provenance.get("config", {}).get("provenance")
        if earlier and earlier.get("format") != "memory":
            return earlier
        keys = ("repository", "revision", "subfolder", "format")
    else:
        keys = ("repository", "revision", "subfolder", "format", "folds", "config")
    return {key: provenance[key] for key in keys if key in provenance}


FORMATS = (
    Format(
        name=NAME,
        summary=f"{CONFIG} and layer_{{i}}.safetensors, as written by save_pretrained",
        detect=_detect,
        open=open_native,
        save=save_set,
    ),
)

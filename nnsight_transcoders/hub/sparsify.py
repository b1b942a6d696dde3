"""sparsify's layout (EleutherAI): ``layers.{L}.mlp/{cfg.json,sae.safetensors}``.

``encoder.weight (F, d)``, ``encoder.bias``, ``W_dec (F, d)``, ``b_dec`` and, with a skip path,
``W_skip``, applied as ``x @ W_skip.T``. A ReLU comes before the choice of the top ``k``; with
``activation: groupmax`` one of each of ``k`` groups is kept.

Whether ``b_dec`` is subtracted from the input: sparsify does so unless ``cfg.json`` has
``transcode: true``. Files from before that key (February 2025) come from code that always did, so
where the key is missing it is done, and folded into ``b_enc``. ``legacy_centering=`` overrides
what the key says. ``transcode: false`` is an autoencoder and refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.folds import INPUT_CENTRING, fold_input_centring
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    choose_layers,
    files_by_layer,
)
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.hub.tensors import TensorInfo
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_FILE = re.compile(
    r"^(?P<folder>(?:.*/)?(?:[A-Za-z_]+\.)*(?:layers|h|blocks)\.(?P<layer>\d{1,4})\.mlp)"
    r"/sae\.safetensors$"
)
_KEYS = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
_KNOWN = {"k", "transcode", "skip_connection", "activation", "d_in", "num_latents"}


def _detect(snapshot: Snapshot) -> Evidence | None:
    for name in snapshot.files:
        if (match := _FILE.match(name)) and "encoder.weight" in (header := snapshot.header(name)):
            if "W_dec" not in header and any(key.startswith("W_decs.") for key in header):
                return None  # a cross-layer set of clt-training, in folders of the same names
            config = f"{match['folder']}/{CONFIG}"
            if config in snapshot.files:
                if "n_targets" in snapshot.json(config):
                    return None  # clt-training's, of any kind
                return Evidence(Strength.LAYER_CONFIG, f"{name} and its {CONFIG}")
            return Evidence(Strength.TENSOR_KEYS, f"{name} with encoder.weight")
        if match:
            return None
    return None


def open_sparsify(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open a checkpoint in sparsify's layout; configs and headers are read.

    Raises:
        CheckpointError: What the files do not say and no option settles, or a file that is not
            as it should be.
        ConfigError: An option with a value it cannot have.
    """
    files = files_by_layer(snapshot, _FILE, f"layers.{{i}}.mlp/{WEIGHTS}")
    chosen = choose_layers(files, layers, snapshot.where)
    raw = {layer: _config(snapshot, files[layer]) for layer in chosen}
    headers = snapshot.headers([files[layer] for layer in chosen])
    plans = {}
    centring: dict[str, str] = {}
    for layer in chosen:
        where = f"{files[layer]} of {snapshot.where}"
        centred, centring[str(layer)] = _centring(raw[layer], options, where)
        plans[layer] = _plan(
            layer, files[layer], headers[files[layer]], raw[layer], where, centred, options
        )
    folds = [INPUT_CENTRING] if any(plan.fold for plan in plans.values()) else []
    provenance = {"format": NAME, "config": {str(n): raw[n] for n in chosen}, "folds": folds}
    return TensorSource(snapshot, plans, {**provenance, "centring": centring})


def _config(snapshot: Snapshot, file: str) -> dict[str, Any]:
    name = f"{file.rpartition('/')[0]}/{CONFIG}"
    return snapshot.json(name) if name in snapshot.files else {}


def _centring(raw: Mapping[str, Any], options: Mapping[str, Any], where: str) -> tuple[bool, str]:
    """Whether ``b_dec`` is subtracted from the input, and why."""
    given, transcode = options.get("legacy_centering"), raw.get("transcode")
    if given is not None:
        if not isinstance(given, bool):
            raise ConfigError(f"legacy_centering must be True or False, got {given!r}")
        return given, f"legacy_centering={given} was given"
    if transcode is True:
        return False, f'{CONFIG} has "transcode": true'
    if "transcode" not in raw:
        return True, f'{CONFIG} has no "transcode", as before 2025-02: b_dec is subtracted'
    raise CheckpointError(
        f'{where}: its {CONFIG} has "transcode": {transcode!r}, so it is an autoencoder. If you '
        "know that it is a transcoder, pass legacy_centering=True (b_dec is subtracted from the "
        "input) or legacy_centering=False"
    )


def _plan(
    layer: int,
    file: str,
    header: Mapping[str, TensorInfo],
    raw: Mapping[str, Any],
    where: str,
    centred: bool,
    options: Mapping[str, Any],
) -> LayerPlan:
    d_in, width, d_out = _widths(header, where)
    if centred and d_in != d_out:
        raise CheckpointError(
            f"{where} reads {d_in} values and writes {d_out}, so b_dec cannot be subtracted from "
            "the input; pass legacy_centering=False"
        )
    skip = "W_skip" in header
    _check_config(raw, {"d_in": d_in, "num_latents": width}, skip, where)
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_out,
        d_transcoder=width,
        layer=layer,
        **_activation(raw, options, width, where),
        relu_first=True,
        input_site=options.get("input_site") or "N1",
        output_site=options.get("output_site") or "O",
        skip=skip,
        leading_positions=options.get("leading_positions", 0),
        base_model=options.get("base_model"),
        dtype=header["encoder.weight"].torch_name,
        source_format=NAME,
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
    )
    names = [name for name in _KEYS if name != "W_skip" or skip]
    refs = {name: TensorRef(file, _KEYS[name]) for name in names}
    plan = LayerPlan(config, refs, fold=fold_input_centring if centred else None)
    check_header(where, file, header, plan)
    return plan


def _widths(header: Mapping[str, TensorInfo], where: str) -> tuple[int, int, int]:
    """d_in, d_transcoder, d_out of the tensors."""
    shapes = {name: info.shape for name, info in sorted(header.items())}
    if [len(shapes.get(key, ())) for key in ("encoder.weight", "b_dec")] != [2, 1]:
        raise CheckpointError(
            f"{where} has {', '.join(f'{name} {shape}' for name, shape in shapes.items())}; "
            "expected encoder.weight (F, d), encoder.bias, W_dec (F, d), b_dec"
        )
    width, d_in = shapes["encoder.weight"]
    return d_in, width, shapes["b_dec"][0]


def _check_config(
    raw: Mapping[str, Any], found: Mapping[str, int], has_skip: bool, where: str
) -> None:
    """Check that the config says nothing against the tensors (a width of 0 means "unset")."""
    for key, value in found.items():
        if raw.get(key) not in (None, 0, value):
            raise CheckpointError(f"{where} has {key}={value}, but {CONFIG} says {raw[key]!r}")
    if raw.get("skip_connection") not in (None, has_skip):
        raise CheckpointError(
            f"{where} has {'a' if has_skip else 'no'} W_skip, but {CONFIG} says "
            f"skip_connection={raw['skip_connection']!r}"
        )


def _activation(
    raw: Mapping[str, Any], options: Mapping[str, Any], width: int, where: str
) -> dict[str, Any]:
    k = options.get("k")
    k = raw.get("k") if k is None else k
    if isinstance(k, bool) or not isinstance(k, int):
        raise CheckpointError(
            f"{where}: {CONFIG} does not say k as a number (it says {k!r}); pass k=..."
        )
    name = raw.get("activation", "topk")
    if name == "topk":
        return {"activation": "topk", "k": k}
    if name == "groupmax":
        if k < 1 or width % k:
            raise CheckpointError(f"{where}: {width} features do not make {k} groups (groupmax)")
        return {"activation": "grouptopk", "k": 1, "n_groups": k}
    raise CheckpointError(f"{where}: {CONFIG} names the activation {name!r}; known: topk, groupmax")


FORMATS = (
    Format(
        name=NAME,
        summary=f"layers.{{i}}.mlp/{CONFIG} and {WEIGHTS}",
        detect=_detect,
        open=open_sparsify,
        options={
            "k": f"features kept, over what {CONFIG} says",
            "legacy_centering": "whether b_dec is subtracted from the input, over what files say",
            "input_site": "where it reads (default N1)",
            "output_site": "where it writes (default O)",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, which the files do not hold",
        },
    ),
)

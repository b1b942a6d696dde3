"""EleutherAI's ``clt-training``: cross-layer and per-layer transcoders in sparsify's folders.

A folder per layer (``layers.{L}.mlp`` or ``h.{L}.mlp``) with ``cfg.json`` and ``sae.safetensors``;
``n_targets`` in the config tells it from sparsify's own sets. Read from its
``sparsify/sparse_coder.py`` and ``sparsify/runner.py``:

* ``encoder.weight (F, d)``, ``encoder.bias``; activation TopK after a ReLU, or groupmax (the
  largest of each of ``k`` groups).
* Decoders, by ``coalesce_topk``. ``none``: ``W_decs.{j} (F, d)`` writes to layer ``L + j``
  (``per_source_tied``: one ``W_dec`` for all). ``concat``: all sources of a layer share the
  ``W_dec`` in *its* folder. ``per-layer``: that ``W_dec`` is ``(sources * F, d)``, one after the
  other.
* ``b_decs.{j}`` is added by source ``L`` to layer ``L + j``: a layer's bias is the sum.
* ``W_skips.{j}``: only ``j = 0`` has a place here; the others must be zero.
* With ``normalize_io`` the input is ``x * sqrt(d) / in_norm`` and a layer's output is multiplied by
  ``out_norm / sqrt(d)`` of that layer; both are folded into the weights.
* ``post_enc_scales.{j}`` is folded into the decoder; ``post_encs.{j}`` (a bias on active features)
  must be zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.assembled import AssembledSource, Assembly, check_file
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_shape
from nnsight_transcoders.hub.clt_training_parts import Layout, builder, layer_pieces
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    check_whole,
    choose_layers,
)
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "clt-training"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_FOLDER = re.compile(r"(?:^|\.)(\d+)\.mlp$")
#: Options of the trainer that change what a forward pass computes and have no place here.
_REFUSED = {
    "divide_cross_layer": "divides what earlier layers write by their number as it runs",
    "topk_coalesced": "chooses the top k anew at every layer written to",
    "secondary_target_tied": "adds a second decoder per layer written to",
}
_MODES = {"none": "pairs", "concat": "target", "per-layer": "blocks"}


def layer_folders(snapshot: Snapshot) -> dict[int, str]:
    """Layer -> folder, of the folders that hold a config and weights."""
    found = {}
    for name in snapshot.files:
        folder = PurePosixPath(name).parent
        match = _FOLDER.search(folder.name)
        if PurePosixPath(name).name == CONFIG and match:
            found[int(match[1])] = str(folder)
    return found


def _detect(snapshot: Snapshot) -> Evidence | None:
    folders = layer_folders(snapshot)
    if not folders:
        return None
    name = f"{folders[min(folders)]}/{CONFIG}"
    if "n_targets" not in snapshot.json(name):
        return None
    return Evidence(Strength.LAYER_CONFIG, f"{name} with n_targets")


def open_clt_training(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> AssembledSource:
    """Open a set in this layout; configs and headers are read.

    Raises:
        CheckpointError: A config that has no place here, or files that contradict it.
        InputError: Only some layers of a cross-layer set are asked for.
    """
    folders = layer_folders(snapshot)
    if not folders:
        raise CheckpointError(
            f"{snapshot.where} has no folders layers.{{i}}.mlp or h.{{i}}.mlp with {CONFIG}; it "
            f"has {snapshot.listing()}"
        )
    chosen = choose_layers(folders, layers, snapshot.where)
    raws = {layer: snapshot.json(f"{folders[layer]}/{CONFIG}") for layer in chosen}
    mode = _common_mode(snapshot, folders, raws)
    files = {layer: f"{folders[layer]}/{WEIGHTS}" for layer in chosen}
    found = snapshot.headers(list(files.values()))
    headers = {layer: found[file] for layer, file in files.items()}
    layouts = {layer: Layout(mode, layer, files, headers, raws) for layer in chosen}
    plans = {layer: _plan(snapshot, layouts[layer], options) for layer in chosen}
    every = [piece for plan in plans.values() for piece in plan.pieces.values()]
    for layer, file in files.items():
        mine = [piece for piece in every if piece.file == file]
        check_file(f"{file} of {snapshot.where}", found[file], mine, layouts[layer].aliases())
    config = {folders[layer]: raw for layer, raw in raws.items()}
    folds = ["input and output norms"] if raws[chosen[0]].get("normalize_io") else []
    return AssembledSource(snapshot, plans, {"format": NAME, "config": config, "folds": folds})


def _common_mode(
    snapshot: Snapshot, folders: Mapping[int, str], raws: Mapping[int, Mapping[str, Any]]
) -> str:
    """The kind of all layers; a cross-layer set must be there and be opened whole."""
    modes = {
        _mode(raw, f"{folders[layer]}/{CONFIG} of {snapshot.where}") for layer, raw in raws.items()
    }
    if len(modes) > 1:
        raise CheckpointError(f"{snapshot.where}: its layers differ in kind: {', '.join(modes)}")
    mode = modes.pop()
    if mode != "single":
        check_whole(folders, raws, snapshot.where)
        if list(raws) != list(range(len(raws))):
            raise CheckpointError(
                f"{snapshot.where} has layers {list(raws)}; a cross-layer transcoder needs all "
                "of them from 0 on"
            )
    return mode


def _mode(raw: Mapping[str, Any], where: str) -> str:
    """How the decoders are kept: one of ``Layout``'s modes.

    Raises:
        CheckpointError: An option that changes the forward pass and has no place here.
    """
    for key, reason in _REFUSED.items():
        if raw.get(key):
            raise CheckpointError(f"{where} has {key}, which {reason}: it is not read")
    if not raw.get("transcode"):
        raise CheckpointError(f"{where} has no 'transcode: true': it is a sparse autoencoder")
    if not isinstance(raw.get("n_targets", 0), int):
        raise CheckpointError(f"{where}: n_targets must be a number, got {raw['n_targets']!r}")
    if raw.get("n_targets", 0) == 0:
        return "single"
    coalesce = str(raw.get("coalesce_topk", "none"))
    if coalesce not in _MODES:
        raise CheckpointError(
            f"{where}: coalesce_topk {coalesce!r} is not known; known: {', '.join(_MODES)}"
        )
    return "source" if coalesce == "none" and raw.get("per_source_tied") else _MODES[coalesce]


def _plan(snapshot: Snapshot, layout: Layout, options: Mapping[str, Any]) -> Assembly:
    layer = layout.layer
    file, header, raw = layout.files[layer], layout.headers[layer], layout.raws[layer]
    where = f"{file} of {snapshot.where}"
    width, d_model = tensor_shape(header, "encoder.weight", 2, where)
    if raw.get("d_in") not in (None, d_model):
        raise CheckpointError(f"{where} has d_in={d_model}, but {CONFIG} says {raw['d_in']}")
    n_layers = len(layout.files)
    if layout.mode != "single" and raw["n_targets"] != n_layers - layer:
        raise CheckpointError(
            f"{where}: {CONFIG} says n_targets={raw['n_targets']}, but layer {layer} of {n_layers} "
            f"writes to {n_layers - layer} layers; folders are missing or do not belong together"
        )
    config = TranscoderConfig(
        d_in=d_model,
        d_out=d_model,
        d_transcoder=width,
        layer=layer,
        **_activation(raw, where, options),
        input_site=options.get("input_site", "N1"),
        output_site=options.get("output_site", "O"),
        skip=bool(raw.get("skip_connection")),
        cross_layer=layout.mode != "single",
        leading_positions=options.get("leading_positions", 0),
        base_model=options.get("base_model"),
        dtype=header["encoder.weight"].torch_name,
        source_format=NAME,
        extra=dict(raw),
    )
    pieces = layer_pieces(layout, width, d_model)
    targets = None if layout.mode == "single" else tuple(range(layer, n_layers))
    return Assembly(config, pieces, builder(layout, where), targets)


def _activation(raw: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    name = raw.get("activation", "topk")
    k = options.get("k")
    k = raw.get("k") if k is None else k
    if name not in ("topk", "groupmax"):
        raise CheckpointError(
            f"{where}: activation {name!r} is not read"
            + (" (it chooses features over a batch)" if name == "batchtopk" else "")
            + "; known: topk, groupmax"
        )
    if not isinstance(k, int):
        raise CheckpointError(f"{where}: {CONFIG} has no k as a number: pass k=...")
    if name == "topk":
        return {"activation": "topk", "k": k}
    return {"activation": "grouptopk", "k": 1, "n_groups": k}


FORMATS = (
    Format(
        name=NAME,
        summary="folders layers.{i}.mlp with cfg.json (n_targets) and sae.safetensors",
        detect=_detect,
        open=open_clt_training,
        options={
            "k": "features kept, over the config's k",
            "input_site": "where it reads (default N1)",
            "output_site": "where it writes (default O)",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, which the files do not hold",
        },
    ),
)

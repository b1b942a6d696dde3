"""llamascopium's layout (OpenMOSS, ``Llama-Scope-2-*``): per-layer and cross-layer transcoders.

A folder per layer, ``{kind}/{width}/{k}/layer{L}_...``, with ``config.json``, ``lm_config.json``
and ``sae_weights.safetensors``: ``W_E (d, F)``, ``b_E``, ``W_D (F, d)``, perhaps ``b_D``. A
cross-layer transcoder is one such folder (``llamascopium_clt``). Read from llamascopium's
``models/sparse_dictionary.py``, ``models/sae.py`` and ``models/clt.py``.

With ``norm_activation: dataset-wise`` the weights are for inputs and outputs scaled to an average
norm of ``sqrt(d)``: ``s = sqrt(d) / average``, the averages being in the file. That is folded in:
``b_enc = b_E / s_in``, ``W_dec = W_D * s_in / s_out``, ``b_dec = b_D / s_out``, and the threshold
becomes ``exp(log_jumprelu_threshold) / s_in``. With ``sparsity_include_decoder_norm`` (its default)
the activation function sees pre-activations times the norm of the stored decoder row ``n``. For
JumpReLU the threshold is divided by it. For TopK the features are counted in the scaled unit, which
chooses the same ones and reconstructs the same: the encoder row is multiplied by ``n`` and the
decoder row divided by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import hooks, llamascopium_clt
from nnsight_transcoders.hub.assembled import (
    AssembledSource,
    Assembly,
    Header,
    Piece,
    check_file,
    scaled,
)
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_shape
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, choose_layers
from nnsight_transcoders.hub.llamascopium_parts import (
    CONFIG,
    LOG_THRESHOLD,
    NAME,
    WEIGHTS,
    activation,
    average_key,
    common_fields,
    fold_names,
    gated,
    layer_of,
    scale,
    uses_averages,
)
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.transcoder import TranscoderConfig

_LAYER_FOLDER = re.compile(r"layer_?\d+", re.IGNORECASE)


def weight_folders(snapshot: Snapshot) -> list[str]:
    """The folders that hold a config and weights; ``"."`` for the snapshot itself."""
    parents = [
        str(PurePosixPath(name).parent)
        for name in snapshot.files
        if PurePosixPath(name).name == WEIGHTS
    ]
    return [folder for folder in parents if inside(folder, CONFIG) in snapshot.files]


def inside(folder: str, name: str) -> str:
    """A name in a folder of the snapshot."""
    return str(PurePosixPath(folder) / name)


def _detect(snapshot: Snapshot) -> Evidence | None:
    folders = weight_folders(snapshot)
    if not folders:
        return None
    return Evidence(Strength.LAYER_CONFIG, f"{folders[0]}/{CONFIG} with {WEIGHTS}")


def choose_folder(snapshot: Snapshot, wanted: str | None) -> list[str]:
    """The weight folders of one set: those that lie in the same folder.

    Raises:
        CheckpointError: There are several sets and ``folder=`` does not say which, or none.
    """
    sets: dict[str, list[str]] = {}
    for folder in weight_folders(snapshot):
        parts = PurePosixPath(folder)
        own = _LAYER_FOLDER.search(parts.name) is not None
        sets.setdefault(str(parts.parent if own else parts), []).append(folder)
    known = ", ".join(sorted(sets)) or "none"
    if wanted is not None:
        name = str(PurePosixPath(wanted.strip("/") or "."))
        sets = {key: value for key, value in sets.items() if key == name}
    if len(sets) == 1:
        return next(iter(sets.values()))
    problem = f"has no set in folder {wanted!r}" if wanted is not None else "holds several sets"
    raise CheckpointError(f"{snapshot.where} {problem}; say which with folder=, one of {known}")


def open_llamascopium(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> AssembledSource:
    """Open a set in this layout; configs and headers are read.

    Raises:
        CheckpointError: A config that cannot be read as a transcoder, or files that contradict it.
        ConfigError: An option with a value it cannot have.
    """
    folders = choose_folder(snapshot, options.get("folder"))
    raws = {folder: snapshot.json(inside(folder, CONFIG)) for folder in folders}
    for folder, raw in raws.items():
        check_kind(raw, f"{inside(folder, CONFIG)} of {snapshot.where}")
    if any(raw["sae_type"] == "clt" for raw in raws.values()):
        if len(folders) > 1:
            raise CheckpointError(f"{snapshot.where} holds several cross-layer sets; pass folder=")
        return llamascopium_clt.open_cross_layer(
            snapshot, folders[0], raws[folders[0]], layers, options
        )
    by_layer = _by_layer(snapshot, raws)
    chosen = choose_layers(by_layer, layers, snapshot.where)
    headers = snapshot.headers([inside(by_layer[layer], WEIGHTS) for layer in chosen])
    plans = {
        layer: _plan(snapshot, layer, by_layer[layer], raws[by_layer[layer]], headers, options)
        for layer in chosen
    }
    used = {by_layer[layer]: raws[by_layer[layer]] for layer in chosen}
    folds = fold_names(next(iter(used.values())))
    return AssembledSource(snapshot, plans, {"format": NAME, "config": used, "folds": folds})


def _by_layer(snapshot: Snapshot, raws: Mapping[str, Mapping[str, Any]]) -> dict[int, str]:
    """Layer -> folder, by the hook each layer reads."""
    found: dict[int, str] = {}
    for folder, raw in raws.items():
        layer = layer_of(raw.get("hook_point_in"), f"{inside(folder, CONFIG)} of {snapshot.where}")
        if layer in found:
            raise CheckpointError(
                f"{snapshot.where}: {folder} and {found[layer]} are both of layer {layer}"
            )
        found[layer] = folder
    return found


def check_kind(raw: Mapping[str, Any], where: str) -> None:
    """Refuse what is no transcoder, by name.

    Raises:
        CheckpointError: Lorsa, a GLU encoder, a sparse autoencoder, or an unknown type.
    """
    kind = raw.get("sae_type")
    if kind in ("lorsa", "lora", "molt", "crosscoder"):
        raise CheckpointError(
            f"{where}: this is a {kind!r} checkpoint"
            + (" (it replaces attention, not MLPs)" if kind == "lorsa" else "")
            + "; this package reads transcoders only. Choose a transcoder folder with folder="
        )
    if kind not in ("sae", "clt"):
        raise CheckpointError(f"{where}: sae_type {kind!r} is not known; known: sae, clt")
    if raw.get("use_glu_encoder"):
        raise CheckpointError(
            f"{where}: its encoder is a gated linear unit (use_glu_encoder, W_E_glu), whose "
            "pre-activations are not linear in the input; circuits cannot be traced through it, so "
            "it is refused"
        )
    if kind == "sae" and raw.get("hook_point_in") == raw.get("hook_point_out"):
        raise CheckpointError(
            f"{where}: it reads and writes {raw.get('hook_point_in')!r}, so it is a sparse "
            "autoencoder and no transcoder"
        )


def _plan(
    snapshot: Snapshot,
    layer: int,
    folder: str,
    raw: Mapping[str, Any],
    headers: Mapping[str, Header],
    options: Mapping[str, Any],
) -> Assembly:
    file, config_at = inside(folder, WEIGHTS), f"{inside(folder, CONFIG)} of {snapshot.where}"
    header, where = headers[file], f"{file} of {snapshot.where}"
    d_in, width = tensor_shape(header, "W_E", 2, where)
    if raw.get("d_model") not in (None, d_in):
        raise CheckpointError(f"{where} has d_model={d_in}, but {CONFIG} says {raw['d_model']}")
    kind, k = activation(raw, where, options)
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_in,
        d_transcoder=width,
        layer=layer,
        activation=kind,
        k=k,
        input_site=options.get("input_site")
        or hooks.input_site(raw.get("hook_point_in"), config_at),
        output_site=options.get("output_site")
        or hooks.output_site(raw.get("hook_point_out"), config_at),
        dtype=header["W_E"].torch_name,
        **common_fields(snapshot, folder, raw, options),
    )
    pieces = _pieces(file, config, raw, where)
    averages = [average_key(raw.get(key)) for key in ("hook_point_in", "hook_point_out")]
    check_file(where, header, list(pieces.values()), averages)

    def build(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _fold(tensors, raw, kind, where)

    return Assembly(config, pieces, build)


def _pieces(
    file: str, config: TranscoderConfig, raw: Mapping[str, Any], where: str
) -> dict[str, Piece]:
    d_in, width = config.d_in, config.d_transcoder
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "W_E": ((d_in, width), 1),
        "b_E": ((width,), 0),
        "W_D": ((width, d_in), 0),
    }
    if raw.get("use_decoder_bias", True):
        shapes["b_D"] = ((d_in,), None)
    if config.activation == "jumprelu":
        shapes[LOG_THRESHOLD] = ((width,), 0)
    if uses_averages(raw, where):
        hooked = (raw.get("hook_point_in"), raw.get("hook_point_out"))
        shapes |= {average_key(hook): ((), None) for hook in hooked}
    return {key: Piece(file, key, shape, features=axis) for key, (shape, axis) in shapes.items()}


def _fold(
    tensors: Mapping[str, Tensor], raw: Mapping[str, Any], kind: str, where: str
) -> dict[str, Tensor]:
    """Stored tensors -> canonical form (see the module's docstring)."""
    d_in = tensors["W_E"].shape[0]
    s_in = scale(tensors, raw, raw.get("hook_point_in"), d_in, where)
    s_out = scale(tensors, raw, raw.get("hook_point_out"), d_in, where)
    found = {
        "W_enc": tensors["W_E"].T.contiguous(),
        "b_enc": scaled(tensors["b_E"], 1 / s_in),
        "W_dec": scaled(tensors["W_D"], s_in / s_out),
        "b_dec": scaled(tensors.get("b_D", torch.zeros(d_in)), 1 / s_out),
    }
    norms = tensors["W_D"].float().norm(dim=1)
    return gated(found, norms, raw, kind, tensors.get(LOG_THRESHOLD), s_in)


FORMATS = (
    Format(
        name=NAME,
        summary="folders with config.json and sae_weights.safetensors",
        detect=_detect,
        open=open_llamascopium,
        options={
            "folder": "which set, where a repository holds several ('transcoder/8x/k64')",
            "k": "features kept by TopK, over the config's top_k",
            "input_site": "where it reads, over the config's hook",
            "output_site": "where it writes, over the config's hook",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, where lm_config.json does not hold it",
        },
    ),
)

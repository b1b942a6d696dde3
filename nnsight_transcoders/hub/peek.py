"""The "Peek" layout: one folder per layer with ``sae.json`` and ``sae.safetensors``.

The folders are named after the layer (``gpt2-small-dun-chl-mlp-tc8``). ``sae.json`` gives
``d_in``, ``num_features``, ``d_out``, ``act_fn`` (``relu`` or ``top_k``, which has no ReLU) and
``top_k``; ``sae_info.json``, where there is one, the layers and places it reads and writes.
Tensors: ``W_enc (d, F)``, ``b_enc``, ``W_dec (F, d)``, ``b_dec``; nothing is subtracted from the
input.

Where it reads, in this order: ``input_site=``; a hook name in ``sae.json`` or ``sae_info.json``;
the place in ``sae_info.json`` (``mid`` is the residual stream; ``mlp_in`` is the norm before its
gain, or its output in models that run attention and MLP in parallel, as published for Pythia); else
the norm before its gain, as in the GPT-2 set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, choose_layers
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.hub.tensors import TensorInfo
from nnsight_transcoders.transcoder import InputSite, OutputSite, TranscoderConfig

NAME = "peek"
CONFIG = "sae.json"
INFO = "sae_info.json"

_LAYER = re.compile(r"(\d+)$")
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
_KNOWN = {"d_in", "d_out", "num_features", "dtype", "act_fn", "top_k", "tensors_filename"}
_HOOK_KEYS = {
    "input": ("hook_point", "hook_name", "hook_point_in", "input_hook"),
    "output": ("out_hook_point", "hook_name_out", "hook_point_out", "output_hook"),
}


def _detect(snapshot: Snapshot) -> Evidence | None:
    found = _folders(snapshot)
    if not found:
        return None
    return Evidence(Strength.SAE_JSON, f"{len(found)} folder(s) with {CONFIG}, such as {found[0]}")


def open_peek(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open a checkpoint in the "Peek" layout; the JSON files and headers are read.

    Raises:
        CheckpointError: A folder whose layer is not known, or a file that is not as it should be.
    """
    folders: dict[int, str] = {}
    for folder in _folders(snapshot):
        layer = _layer_of(folder, snapshot)
        if layer in folders:
            raise CheckpointError(
                f"{snapshot.where} has two folders for layer {layer}: {folders[layer]} and {folder}"
            )
        folders[layer] = folder
    chosen = choose_layers(folders, layers, snapshot.where)
    raw = {layer: _read_configs(snapshot, folders[layer]) for layer in chosen}
    files = {layer: _weights_file(snapshot, folders[layer], raw[layer]) for layer in chosen}
    headers = snapshot.headers(list(files.values()))
    plans = {
        layer: _plan(layer, files[layer], headers[files[layer]], raw[layer], snapshot, options)
        for layer in chosen
    }
    return TensorSource(
        snapshot, plans, {"format": NAME, "config": {str(n): raw[n] for n in chosen}}
    )


def _folders(snapshot: Snapshot) -> list[str]:
    paths = [PurePosixPath(name) for name in snapshot.files]
    return [str(path.parent) for path in paths if path.name == CONFIG]


def _layer_of(folder: str, snapshot: Snapshot) -> int:
    match = _LAYER.search(folder)
    if match:
        return int(match[1])
    layer = _place(_info(snapshot, folder), "input").get("layer")
    if isinstance(layer, int):
        return layer
    raise CheckpointError(
        f"folder {folder!r} of {snapshot.where} does not end in a layer number, and it has no "
        f"{INFO} that names the layer"
    )


def _info(snapshot: Snapshot, folder: str) -> dict[str, Any]:
    name = _inside(folder, INFO)
    return snapshot.json(name) if name in snapshot.files else {}


def _inside(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)


def _read_configs(snapshot: Snapshot, folder: str) -> dict[str, Any]:
    """``sae.json``, with ``sae_info.json`` under the key ``sae_info`` where there is one."""
    raw = snapshot.json(_inside(folder, CONFIG))
    info = _info(snapshot, folder)
    return {**raw, "sae_info": info} if info else raw


def _weights_file(snapshot: Snapshot, folder: str, raw: Mapping[str, Any]) -> str:
    name = _inside(folder, str(raw.get("tensors_filename") or "sae.safetensors"))
    snapshot.require(name)
    return name


def _plan(
    layer: int,
    file: str,
    header: Mapping[str, TensorInfo],
    raw: Mapping[str, Any],
    snapshot: Snapshot,
    options: Mapping[str, Any],
) -> LayerPlan:
    where = f"{file} of {snapshot.where}"
    d_in, width, d_out = _widths(header, raw, where)
    activation, k = _activation(raw, where)
    reads, writes = _sites(raw, where, options)
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_out,
        d_transcoder=width,
        layer=layer,
        activation=activation,
        k=k,
        relu_first=activation != "topk",
        input_site=reads,
        output_site=writes,
        leading_positions=options.get("leading_positions", 0),
        base_model=options.get("base_model"),
        dtype=header["W_enc"].torch_name,
        source_format=NAME,
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
    )
    refs = {name: TensorRef(file, name, transposed=name == "W_enc") for name in _WEIGHTS}
    plan = LayerPlan(config, refs)
    check_header(where, file, header, plan)
    return plan


def _widths(
    header: Mapping[str, TensorInfo], raw: Mapping[str, Any], where: str
) -> tuple[int, int, int]:
    """d_in, d_transcoder, d_out of the tensors, which ``sae.json`` must not contradict."""
    matrices = [header[name].shape for name in ("W_enc", "W_dec") if name in header]
    if [len(shape) for shape in matrices] != [2, 2]:
        raise CheckpointError(
            f"{where}: expected {', '.join(_WEIGHTS)} with W_enc (d, F) and W_dec (F, d); it has "
            + ", ".join(f"{name} {info.shape}" for name, info in sorted(header.items()))
        )
    (d_in, width), (_, d_out) = matrices
    for key, found in (("d_in", d_in), ("num_features", width), ("d_out", d_out)):
        if raw.get(key) not in (None, found):
            raise CheckpointError(f"{where} has {key}={found}, but {CONFIG} says {raw[key]}")
    return d_in, width, d_out


def _activation(raw: Mapping[str, Any], where: str) -> tuple[str, int | None]:
    name = raw.get("act_fn", "relu")
    if name == "relu":
        return "relu", None
    if name == "top_k" and isinstance(raw.get("top_k"), int):
        return "topk", raw["top_k"]
    problem = "top_k without its number" if name == "top_k" else f"act_fn {name!r}"
    raise CheckpointError(
        f"{CONFIG} beside {where} has {problem}; known: relu, top_k with a number"
    )


def _sites(
    raw: Mapping[str, Any], where: str, options: Mapping[str, Any]
) -> tuple[InputSite, OutputSite]:
    """Where it reads and writes; see the module's docstring for the order."""
    info = raw.get("sae_info", {})
    config = f"{CONFIG} beside {where}"
    reads, writes = options.get("input_site"), options.get("output_site")
    if reads is None:
        hook = _hook(raw, info, "input")
        reads = hooks.input_site(hook, config) if hook else _place_read(info, config)
    if writes is None:
        # TransformerLens' hook_mlp_out is the MLP's own output in the models this layout is for.
        place = _place(info, "output").get("sublayer")
        hook = _hook(raw, info, "output")
        if hook and hook.split(".")[-1] != "hook_mlp_out":
            writes = hooks.output_site(hook, config)
        elif place in (None, "mlp_out"):
            writes = "O"
        else:
            raise CheckpointError(f"{config}: it writes to {place!r}; pass output_site=")
    return reads, writes


def _hook(raw: Mapping[str, Any], info: Mapping[str, Any], side: str) -> str | None:
    for data in (raw, info):
        for key in _HOOK_KEYS[side]:
            if isinstance(data.get(key), str):
                return data[key]
    return None


def _place(info: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    place = info.get(f"{side}_layer")
    return place if isinstance(place, dict) else {}


def _place_read(info: Mapping[str, Any], config: str) -> InputSite:
    layer = _place(info, "input")
    place = layer.get("sublayer")
    if place in (None, "mlp_in"):
        return "N1" if layer.get("parallel_attn_mlp") else "N0"
    if place == "mid":
        return "R"
    raise CheckpointError(f"{config}: it reads from {place!r}, which is no input of an MLP")


FORMATS = (
    Format(
        name=NAME,
        summary="one folder per layer with sae.json and sae.safetensors",
        detect=_detect,
        open=open_peek,
        options={
            "input_site": "where it reads, over what the files say",
            "output_site": "where it writes, over what the files say",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, which the files do not hold",
        },
    ),
)

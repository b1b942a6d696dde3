"""``noanabeshima/tiny_model``: the transcoders of a small story-telling model, as torch files.

``mlp_map_test/M{L}_{variant}.pt`` holds ``encoder.weight (F, d)``, ``encoder.bias``,
``decoder.weight (d, F)`` and ``decoder.bias``, ``..._config.json`` beside it the training's
settings. ReLU, from the residual stream before the MLP to the MLP's output. The torch files are
read without running anything in them (``torch_files``) and kept as safetensors copies
(``converted``). Read from the owner's ``tiny_model`` package, whose default variant for every layer
is ``S-3_R1_P0``; ``mlp``, ``attn`` and ``res_*`` beside it hold sparse autoencoders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import IO, Any

from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_shape
from nnsight_transcoders.hub.converted import ConvertedSnapshot, read_heads
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, choose_layers
from nnsight_transcoders.hub.restricted_pickle import TensorRecord
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.hub.tensors import FLOAT_DTYPES, TensorInfo
from nnsight_transcoders.hub.torch_files import open_torch_file
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "tiny-model"
DEFAULT_VARIANT = "S-3_R1_P0"

_FILE = re.compile(r"^mlp_map_test/M(\d+)_(.+)\.pt$")
#: Their names -> ours, and whether the matrix is stored the other way round.
_NAMES = {
    "encoder.weight": ("W_enc", False),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "decoder.bias": ("b_dec", False),
}
_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def _variants(snapshot: Snapshot) -> dict[int, dict[str, str]]:
    """Layer -> variant -> file."""
    found: dict[int, dict[str, str]] = {}
    for name in snapshot.files:
        if match := _FILE.match(name):
            found.setdefault(int(match[1]), {})[match[2]] = name
    return found


def _detect(snapshot: Snapshot) -> Evidence | None:
    for name in snapshot.files:
        if _FILE.match(name):
            return Evidence(Strength.FILE_NAMES, name)
    return None


def open_tiny_model(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open the set; of each torch file only what tells names and shapes is read.

    Raises:
        CheckpointError: A file that is not as it should be, or no such variant.
    """
    variants = _variants(snapshot)
    if not variants:
        raise CheckpointError(
            f"{snapshot.where} has no mlp_map_test/M{{i}}_{{variant}}.pt; it has "
            f"{snapshot.listing()}"
        )
    chosen = choose_layers(variants, layers, snapshot.where)
    files = {layer: _choose(layer, variants[layer], options.get("variant")) for layer in chosen}
    raws = {}
    for file in files.values():
        settings = file.removesuffix(".pt") + "_config.json"
        raws[file] = snapshot.json(settings) if settings in snapshot.files else {}
    headers = read_heads(snapshot, list(files.values()), _read_header)
    plans = {}
    for layer, file in files.items():
        header, where = headers[file], f"{file} of {snapshot.where}"
        width, d_in = tensor_shape(header, "W_enc", 2, where)
        config = TranscoderConfig(
            d_in=d_in,
            d_out=d_in,
            d_transcoder=width,
            layer=layer,
            input_site=options.get("input_site", "R"),
            output_site=options.get("output_site", "O"),
            leading_positions=options.get("leading_positions", 0),
            base_model=options.get("base_model", "noanabeshima/tiny_model"),
            dtype=header["W_enc"].torch_name,
            source_format=NAME,
            extra=raws[file],
        )
        refs = {name: TensorRef(file, name) for name, _ in _NAMES.values()}
        plans[layer] = LayerPlan(config, refs)
        check_header(where, file, header, plans[layer])
    return TensorSource(
        ConvertedSnapshot(snapshot, NAME, _convert), plans, {"format": NAME, "config": raws}
    )


def _choose(layer: int, variants: dict[str, str], wanted: str | None) -> str:
    if wanted is None and len(variants) == 1:
        return next(iter(variants.values()))
    name = DEFAULT_VARIANT if wanted is None else wanted
    if name not in variants:
        raise CheckpointError(
            f"layer {layer} has no variant {name!r}; pass variant=, one of "
            f"{', '.join(sorted(variants))}"
        )
    return variants[name]


def _records(content: Any, where: str) -> dict[str, TensorRecord]:
    """The four tensors' records; nothing else may be in the file."""
    names = sorted(map(str, content)) if isinstance(content, dict) else []
    if names != sorted(_NAMES) or not all(
        isinstance(record, TensorRecord) for record in content.values()
    ):
        raise CheckpointError(
            f"{where} should hold the tensors {', '.join(_NAMES)}; it holds "
            f"{', '.join(names[:12]) or type(content).__name__}"
        )
    for name, record in content.items():
        wanted = 2 if name.endswith("weight") else 1
        if len(record.shape) != wanted or record.storage.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(record.shape)} and dtype "
                f"{record.storage.dtype}, expected {wanted} dimension(s) of a float dtype"
            )
    return content


def _convert(file: IO[bytes], where: str) -> dict[str, Tensor]:
    with open_torch_file(file, where) as (content, read):
        found = {}
        for name, record in _records(content, where).items():
            ours, transposed = _NAMES[name]
            tensor = read(record)
            found[ours] = (tensor.T if transposed else tensor).contiguous()
        return found


def _read_header(file: IO[bytes], where: str) -> dict[str, TensorInfo]:
    with open_torch_file(file, where) as (content, _):
        header = {}
        for name, record in _records(content, where).items():
            ours, transposed = _NAMES[name]
            shape = tuple(record.shape)
            dtype = _DTYPE_NAMES[record.storage.dtype]
            header[ours] = TensorInfo(shape[::-1] if transposed else shape, dtype)
        return header


FORMATS = (
    Format(
        name=NAME,
        summary="mlp_map_test/M{i}_{variant}.pt",
        detect=_detect,
        open=open_tiny_model,
        options={
            "variant": f"which of a layer's files (default {DEFAULT_VARIANT})",
            "input_site": "where it reads (default R)",
            "output_site": "where it writes (default O)",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id",
        },
    ),
)

"""The pickles of the transcoder paper (Dunefsky, Chlenski, Nanda 2024; ``pchlenski``).

One file per layer, named after the hook it reads:
``final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_24576.pt``, a pickle of ``{"cfg",
"state_dict"}`` with ``W_enc (d, F)``, ``b_enc``, ``W_dec (F, d)``, ``b_dec`` (of the input) and
``b_dec_out``: ``relu((x - b_dec) @ W_enc + b_enc) @ W_dec + b_dec_out``. The centring is folded
into ``b_enc``.

TransformerLens, which made the training data, centres every weight that writes to the residual
stream, so the target was the MLP's output minus its mean over the model's width. The layer norms of
GPT-2 do not see that mean, so the model does not either; a comparison with the MLP's own output
(FVU) does.

Pickles are read with ``restricted_pickle``: nothing in them is run. They are converted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.converted import ConvertedSnapshot, read_heads
from nnsight_transcoders.hub.folds import INPUT_CENTRING, centred_bias
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    choose_layers,
    files_by_layer,
)
from nnsight_transcoders.hub.restricted_pickle import Record, TensorRecord, shown
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource
from nnsight_transcoders.hub.torch_files import open_torch_file
from nnsight_transcoders.transcoder import TranscoderConfig, dtype_name

NAME = "dunefsky"
CENTRED_TARGET = (
    "none for the target: it was the MLP's output minus its mean over the model's width"
)

_FILE = re.compile(
    r"^(?:.*/)?final_sparse_autoencoder_(?P<model>.+)_blocks\.(?P<layer>\d{1,4})\."
    r"(?P<hook>[A-Za-z0-9_.]+)_(?P<width>\d+)\.pt$"
)
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "b_dec_out")
_CANONICAL = ("W_enc", "b_enc", "W_dec", "b_dec")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: TransformerLens' names of models whose Hub id is another.
_MODELS = {"gpt2-small": "openai-community/gpt2"}


class _Head(NamedTuple):
    """What a file says before its numbers are read."""

    d_in: int
    width: int
    d_out: int
    dtype: str
    cfg: dict[str, Any]


def _detect(snapshot: Snapshot) -> Evidence | None:
    found = [name for name in snapshot.files if _FILE.match(name)]
    return Evidence(Strength.FILE_NAMES, found[0]) if found else None


def open_dunefsky(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open the paper's pickles; the pickles are read, not the numbers behind them.

    Raises:
        CheckpointError: A file that is not as it should be, or that asks for more than weights.
    """
    files = files_by_layer(snapshot, _FILE, "final_sparse_autoencoder_*.pt")
    chosen = choose_layers(files, layers, snapshot.where)
    heads = read_heads(snapshot, [files[layer] for layer in chosen], _read_head)
    plans = {
        layer: _plan(layer, files[layer], heads[files[layer]], snapshot, options)
        for layer in chosen
    }
    converted = ConvertedSnapshot(snapshot, NAME, _convert)
    return TensorSource(
        converted,
        plans,
        {
            "format": NAME,
            "config": {str(layer): heads[files[layer]].cfg for layer in chosen},
            "folds": [INPUT_CENTRING, CENTRED_TARGET],
        },
    )


def _plan(
    layer: int, file: str, head: _Head, snapshot: Snapshot, options: Mapping[str, Any]
) -> LayerPlan:
    where = f"{file} of {snapshot.where}"
    match = _FILE.match(file)
    assert match is not None
    reads = head.cfg.get("hook_point") or match["hook"]
    writes = head.cfg.get("out_hook_point") or "hook_mlp_out"
    config = TranscoderConfig(
        d_in=head.d_in,
        d_out=head.d_out,
        d_transcoder=head.width,
        layer=layer,
        activation="relu",
        input_site=options.get("input_site") or hooks.input_site(reads, where),
        output_site=options.get("output_site") or hooks.output_site(writes, where),
        leading_positions=options.get("leading_positions", 0),
        base_model=options.get("base_model") or _MODELS.get(match["model"], match["model"]),
        dtype=head.dtype,
        source_format=NAME,
        extra={"target_centred": True},
    )
    return LayerPlan(config, {name: TensorRef(file, name) for name in _CANONICAL})


def _read_head(file: IO[bytes], where: str) -> _Head:
    with open_torch_file(file, where) as (content, _):
        records, cfg = _parts(content, where)
        return _check(records, cfg, where)


def _convert(file: IO[bytes], where: str) -> dict[str, Tensor]:
    """The canonical tensors of one file, with the input's centre folded into ``b_enc``."""
    with open_torch_file(file, where) as (content, read):
        records, cfg = _parts(content, where)
        _check(records, cfg, where)
        W_enc = read(records["W_enc"]).T.contiguous()
        b_enc = centred_bias(W_enc, read(records["b_enc"]), read(records["b_dec"]))
        W_dec = read(records["W_dec"]).contiguous()
        return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": read(records["b_dec_out"])}


def _parts(content: Any, where: str) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    """The tensors' records and the config's plain values."""
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{where} holds no state_dict, as the paper's transcoders do")
    missing = [name for name in _TENSORS if not isinstance(state.get(name), TensorRecord)]
    if missing == ["b_dec_out"]:
        raise CheckpointError(f"{where} has no b_dec_out: it is an autoencoder, not a transcoder")
    unexpected = [shown(name) for name in state if name not in _TENSORS]
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: its state_dict lacks {', '.join(missing) or 'nothing'} and has "
            f"{', '.join(unexpected) or 'nothing'} too many; expected {', '.join(_TENSORS)}"
        )
    cfg = content.get("cfg")
    values = vars(cfg) if isinstance(cfg, Record) else cfg if isinstance(cfg, dict) else {}
    return state, {key: _plain(v) for key, v in values.items() if isinstance(key, str)}


def _plain(value: object) -> str | int | float | bool | None:
    """A config's value as JSON has it; what is more than a plain value becomes its type's name."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return value if isinstance(value, str | int | None) else f"<{type(value).__name__}>"


def _check(records: Mapping[str, TensorRecord], cfg: dict[str, Any], where: str) -> _Head:
    """The widths, which all shapes must agree on."""
    shapes = {name: records[name].shape for name in _TENSORS}
    dims = [len(shapes[name]) for name in _TENSORS]
    d_in, width = shapes["W_enc"] if dims[0] == 2 else (0, 0)
    d_out = shapes["b_dec_out"][0] if dims[4] == 1 else 0
    expected = {
        "W_enc": (d_in, width),
        "b_enc": (width,),
        "W_dec": (width, d_out),
        "b_dec": (d_in,),
        "b_dec_out": (d_out,),
    }
    if shapes != expected or not d_in * width * d_out:
        raise CheckpointError(
            f"{where} has shapes {shapes}, which do not fit together; expected W_enc (d, F), "
            "b_enc (F), W_dec (F, d), b_dec (d), b_dec_out (d)"
        )
    dtype = records["W_enc"].storage.dtype
    if any(record.storage.dtype not in _FLOATS for record in records.values()):
        raise CheckpointError(f"{where} has weights that are no floating-point numbers")
    if cfg.get("is_transcoder") is False:
        raise CheckpointError(f"{where} is an autoencoder by its config, not a transcoder")
    return _Head(d_in, width, d_out, dtype_name(dtype), cfg)


FORMATS = (
    Format(
        name=NAME,
        summary="final_sparse_autoencoder_{model}_blocks.{i}.{hook}_{F}.pt, the paper's pickles",
        detect=_detect,
        open=open_dunefsky,
        options={
            "input_site": "where it reads, over the hook in the files",
            "output_site": "where it writes, over the hook in the files",
            "leading_positions": "positions left out at the start (default 0: trained without BOS)",
            "base_model": "the model's Hub id",
        },
    ),
)

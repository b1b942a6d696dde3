"""Gemma Scope 1 transcoders (Google DeepMind): ``layer_{i}/width_{w}/average_l0_{n}/params.npz``.

``W_enc (d, F)``, ``W_dec (F, d)``, ``b_enc``, ``b_dec``, ``threshold``: JumpReLU on the norm before
its gain, written after the norm that follows the MLP; nothing is subtracted, BOS was left out.
Every layer comes in several sparsities, so one has to be chosen: ``variant=`` by name, ``l0=`` by
target, or by default the lowest of each layer that others use. Autoencoders come in the same
layout; only ``verify`` can tell. Files are converted once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import IO, Any

from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.converted import ConvertedSnapshot, read_heads
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, choose_layers
from nnsight_transcoders.hub.npz import read_npz, read_npz_header
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource
from nnsight_transcoders.hub.tensors import TensorInfo
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "gemma-scope"
#: The lowest L0 of each layer of ``google/gemma-scope-2b-pt-transcoders`` that others use.
LOWEST_L0 = tuple(
    map(int, "76 65 49 54 88 87 95 70 52 72 88 5 6 8 8 8 10 12 13 12 11 13 15 25 37 41".split())
)

_FILE = re.compile(
    r"^layer_(?P<layer>\d{1,4})/(?P<width>width_[^/]+)/average_l0_(?P<l0>\d{1,6})/params\.npz$"
)
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_LOG = logging.getLogger(__name__)

#: Layer -> (width, L0) -> file.
Variants = dict[int, dict[tuple[str, int], str]]


def _detect(snapshot: Snapshot) -> Evidence | None:
    found = [name for name in snapshot.files if _FILE.match(name)]
    return Evidence(Strength.FILE_NAMES, found[0]) if found else None


def open_gemma_scope(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open Gemma Scope transcoders; the arrays' headers are read.

    Raises:
        CheckpointError: A file that is not as it should be, or a variant that is not there.
        ConfigError: An option with a value it cannot have.
    """
    variants: Variants = {}
    for name in snapshot.files:
        if match := _FILE.match(name):
            key = match["width"], int(match["l0"])
            variants.setdefault(int(match["layer"]), {})[key] = name
    if not variants:
        raise CheckpointError(
            f"{snapshot.where} has no layer_*/width_*/average_l0_*/params.npz; it has "
            f"{snapshot.listing()}"
        )
    chosen = choose_layers(variants, layers, snapshot.where)
    files = choose_variants(variants, chosen, options, snapshot.where)
    heads = read_heads(snapshot, list(files.values()), read_npz_header)
    plans = {
        layer: _plan(layer, file, heads[file], f"{file} of {snapshot.where}", options)
        for layer, file in files.items()
    }
    picked = {str(layer): file.removesuffix("/params.npz") for layer, file in files.items()}
    _LOG.info("%s: variants %s", snapshot.where, ", ".join(picked.values()))
    provenance = {"format": NAME, "config": {}, "variants": picked}
    return TensorSource(ConvertedSnapshot(snapshot, NAME, _convert), plans, provenance)


# -- the choice of a variant -------------------------------------------------------------------


def choose_variants(
    variants: Variants, layers: Sequence[int], options: Mapping[str, Any], where: str
) -> dict[int, str]:
    """The file of each layer, by ``variant=``, ``l0=``, or the default; see the module."""
    variant, l0, width = (options.get(name) for name in ("variant", "l0", "width"))
    if variant is not None and l0 is not None:
        raise ConfigError("variant= names the variant and l0= looks for one: pass one of them")
    found = {}
    usual = _has_usual(variants)
    for position, layer in enumerate(layers):
        there = _of_width(variants[layer], width, variant is None, layer, where)
        if variant is not None:
            found[layer] = _named(there, _for_layer(variant, layers, position), layer, where)
        elif l0 is not None:
            target = _for_layer(l0, layers, position)
            if isinstance(target, bool) or not isinstance(target, int | float):
                raise ConfigError(f"l0={target!r} for layer {layer}: give a number")
            found[layer] = there[min(there, key=lambda key: (abs(key[1] - target), key))]
        else:
            lowest = min(there, key=lambda key: (key[1], key))
            preferred = [key for key in there if usual and key[1] == LOWEST_L0[layer]]
            found[layer] = there[preferred[0] if preferred else lowest]
    return found


def _has_usual(variants: Variants) -> bool:
    """Whether this is the set that ``LOWEST_L0`` is about."""
    return all(
        layer < len(LOWEST_L0) and ("width_16k", LOWEST_L0[layer]) in there
        for layer, there in variants.items()
    )


def _of_width(
    there: Mapping[tuple[str, int], str], width: Any, one: bool, layer: int, where: str
) -> dict[tuple[str, int], str]:
    """The variants of the width asked for, else of the smallest (all, where ``variant=`` tells)."""
    widths = sorted({key[0] for key in there}, key=lambda name: (width_number(name), name))
    if width is None and not one:
        return dict(there)
    wanted = widths[0] if width is None else f"width_{str(width).removeprefix('width_')}"
    if wanted not in widths:
        raise CheckpointError(
            f"layer {layer} of {where} has no {wanted}; it has {', '.join(widths)}"
        )
    return {key: file for key, file in there.items() if key[0] == wanted}


def width_number(name: str) -> float:
    """``"width_16k"`` -> 16384, for comparing; infinity where it is no number."""
    match = re.search(r"(\d{1,9})([km]?)$", name)
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2]] if match else float("inf")


def _for_layer(value: Any, layers: Sequence[int], position: int) -> Any:
    """One layer's value of an option: the same for all, or from a mapping or list per layer."""
    layer = layers[position]
    if isinstance(value, Mapping):
        found = value.get(layer, value.get(str(layer)))
        if found is None:
            raise ConfigError(f"the mapping {dict(value)} says nothing of layer {layer}")
        return found
    if isinstance(value, list | tuple):
        if len(value) != len(layers):
            raise ConfigError(f"{len(value)} values for {len(layers)} layers {list(layers)}")
        return value[position]
    return value


def _named(there: Mapping[tuple[str, int], str], variant: Any, layer: int, where: str) -> str:
    wanted = str(variant).strip("/")
    if wanted.isdecimal():
        wanted = f"average_l0_{wanted}"
    fits = [file for file in there.values() if f"/{file}".endswith(f"/{wanted}/params.npz")]
    if len(fits) != 1:
        names = ", ".join(
            file.split("/", 1)[1].rsplit("/", 1)[0] for file in sorted(there.values())
        )
        raise CheckpointError(
            f"layer {layer} of {where} has {'no' if not fits else 'more than one'} variant "
            f"{variant!r}; it has {names}"
        )
    return fits[0]


# -- the files ---------------------------------------------------------------------------------


def _plan(
    layer: int,
    file: str,
    header: Mapping[str, TensorInfo],
    where: str,
    options: Mapping[str, Any],
) -> LayerPlan:
    d_in, width, d_out = _check(header, where)
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_out,
        d_transcoder=width,
        layer=layer,
        activation="jumprelu",
        input_site=options.get("input_site") or "N0",
        output_site=options.get("output_site") or "O'",
        leading_positions=options.get("leading_positions", 1),
        base_model=options.get("base_model"),
        dtype=header["W_enc"].torch_name,
        source_format=NAME,
        extra={"variant": file.removesuffix("/params.npz")},
    )
    return LayerPlan(config, {name: TensorRef(file, name) for name in _TENSORS})


def _check(header: Mapping[str, TensorInfo], where: str) -> tuple[int, int, int]:
    """d_in, d_transcoder, d_out, which all shapes must agree on."""
    shapes = {name: info.shape for name, info in sorted(header.items())}
    d_in, width = shapes["W_enc"] if len(shapes.get("W_enc", ())) == 2 else (0, 0)
    d_out = shapes["W_dec"][1] if len(shapes.get("W_dec", ())) == 2 else 0
    expected = {
        "W_dec": (width, d_out),
        "W_enc": (d_in, width),
        "b_dec": (d_out,),
        "b_enc": (width,),
        "threshold": (width,),
    }
    if shapes != expected or not d_in * width * d_out:
        raise CheckpointError(
            f"{where} has arrays {shapes}; expected W_enc (d, F), W_dec (F, d), b_enc (F), "
            "b_dec (d), threshold (F) and no others"
        )
    return d_in, width, d_out


def _convert(file: IO[bytes], where: str) -> dict[str, Tensor]:
    _check(read_npz_header(file, where), where)
    return read_npz(file, where, transposed=("W_enc",))


FORMATS = (
    Format(
        name=NAME,
        summary="layer_{i}/width_{w}/average_l0_{n}/params.npz",
        detect=_detect,
        open=open_gemma_scope,
        options={
            "variant": "'average_l0_76', 'width_16k/average_l0_76', or one per layer",
            "l0": "take the variant nearest to this L0, or to one per layer",
            "width": "'16k' and the like, where there are several",
            "input_site": "where it reads (default N0)",
            "output_site": "where it writes (default O')",
            "leading_positions": "positions left out at the start (default 1: BOS)",
            "base_model": "the model's Hub id, which the files do not hold",
        },
    ),
)

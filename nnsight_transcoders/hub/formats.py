"""What a checkpoint format is to the registry: a name, how it shows, how it opens.

A format module defines ``Format`` objects and lists them in ``registry``. Nothing else has to
change for a new format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.layer_sources import LayerSource


class Strength(IntEnum):
    """How much a piece of evidence says, the strongest first: the order of detection."""

    NATIVE = 0
    CONFIG_YAML = 1
    LAYER_CONFIG = 2
    SAELENS_CONFIG = 3
    SAE_JSON = 4
    TENSOR_KEYS = 5
    FILE_NAMES = 6


@dataclass(frozen=True)
class Evidence:
    """Why a checkpoint looks like a format: how strong, and what was seen."""

    strength: Strength
    seen: str


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
        name: What ``format=`` calls it.
        summary: Its layout in one line.
        detect: Looks at the file names (and small configs) of a snapshot; None if it is not this.
        open: ``open(snapshot, layers, **options)``; reads configs and headers, no weights.
        options: The format's own options and what each one settles.
        save: ``save(transcoders, folder)``, for a format that can be written.
    """

    name: str
    summary: str
    detect: Callable[[Snapshot], Evidence | None]
    open: Callable[..., LayerSource]
    options: Mapping[str, str] = field(default_factory=dict)
    save: Callable[..., Path] | None = None


def files_by_layer(snapshot: Snapshot, pattern: re.Pattern[str], expected: str) -> dict[int, str]:
    """Layer -> file, for layouts whose file names hold the layer.

    Args:
        snapshot: The checkpoint.
        pattern: Matches a layer's file, with a group ``layer``.
        expected: What such a file is called, for the message.

    Raises:
        CheckpointError: No such file, or two of one layer.
    """
    files: dict[int, str] = {}
    for name in snapshot.files:
        if match := pattern.match(name):
            layer = int(match["layer"])
            if layer in files:
                raise CheckpointError(
                    f"{snapshot.where} has two of layer {layer}: {files[layer]} and {name}; open "
                    "one of them by its own path"
                )
            files[layer] = name
    if not files:
        raise CheckpointError(f"{snapshot.where} has no {expected}; it has {snapshot.listing()}")
    return files


def choose_layers(
    available: Collection[int], layers: Sequence[int] | None, where: str
) -> tuple[int, ...]:
    """The layers to open: all that are there, or those asked for.

    Raises:
        InputError: A layer that is not there, or none at all.
    """
    if layers is None:
        return tuple(sorted(available))
    chosen = tuple(sorted(set(layers)))
    missing = [layer for layer in chosen if layer not in available]
    if missing or not chosen:
        raise InputError(
            f"layers={list(layers)}: {where} has layers {sorted(available)}"
            + (f", not {missing}" if missing else "; name at least one")
        )
    return chosen


def check_whole(available: Collection[int], chosen: Collection[int], where: str) -> None:
    """Check that a cross-layer set is opened whole.

    Raises:
        InputError: Some of its layers are left out.
    """
    if set(chosen) != set(available):
        raise InputError(
            f"{where} is a cross-layer set and cannot be cut to layers {sorted(chosen)}: each "
            "layer's output needs the features of all layers below it. Leave out layers="
        )

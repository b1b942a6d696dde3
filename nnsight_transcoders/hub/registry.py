"""The checkpoint formats, and opening a checkpoint whose format is told by its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub import (
    circuit_tracer,
    clt_training,
    decode_clt,
    dunefsky,
    gemma_scope,
    gemma_scope_2,
    joint_topk,
    llamascopium,
    native,
    peek,
    sackfield,
    saelens,
    sparsify,
    tiny_model,
)
from nnsight_transcoders.hub.formats import Format
from nnsight_transcoders.hub.hub_snapshot import open_snapshot
from nnsight_transcoders.hub.snapshot import LocalSnapshot, Snapshot
from nnsight_transcoders.layer_sources import LayerSource

_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Add a format.

    Raises:
        ConfigError: The name is taken.
    """
    if format.name in _FORMATS:
        raise ConfigError(f"there is a checkpoint format {format.name!r} already")
    _FORMATS[format.name] = format


for _module in (
    native,
    circuit_tracer,
    sparsify,
    saelens,
    peek,
    gemma_scope_2,
    gemma_scope,
    dunefsky,
    sackfield,
    llamascopium,
    clt_training,
    decode_clt,
    joint_topk,
    tiny_model,
):
    for _format in _module.FORMATS:
        register(_format)


def known_formats() -> Mapping[str, Format]:
    """All formats by name, in the order they were registered."""
    return dict(_FORMATS)


def open_checkpoint(
    repo_or_folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    format: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **format_options: Any,
) -> LayerSource:
    """Open a checkpoint without reading its weights.

    Args:
        repo_or_folder: A folder, a Hub id (``"owner/name"``, or ``"owner/name/folder"`` for a set
            in a folder of a repository), or ``"builtin/..."``.
        layers: Open (and download) these layers only.
        format: The format's name, where it cannot be told from the files.
        revision: Branch, tag or commit of the repository.
        cache_dir: The Hub cache to use.
        token: Hub token, or True for the stored one.
        local_files_only: Do not ask the Hub.
        **format_options: What one format needs and does not store (``Format.options``).

    Raises:
        CheckpointError: Nothing readable there, no format or more than one recognised.
        ConfigError: An unknown format or option.
        InputError: A layer that is not there.
    """
    if format is not None and format not in _FORMATS:
        raise ConfigError(
            f"unknown checkpoint format {format!r}; known: {', '.join(sorted(_FORMATS))}"
        )
    if isinstance(repo_or_folder, str) and repo_or_folder.startswith("builtin/"):
        snapshot = _builtin(repo_or_folder)
    else:
        snapshot = open_snapshot(
            repo_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    chosen = detect_format(snapshot) if format is None else _FORMATS[format]
    unknown = sorted(set(format_options) - set(chosen.options))
    if unknown:
        raise ConfigError(
            f"format {chosen.name!r} has no option {', '.join(unknown)}; "
            f"its options: {', '.join(chosen.options) or 'none'}"
        )
    return chosen.open(snapshot, layers, **format_options)


def detect_format(snapshot: Snapshot) -> Format:
    """The format a checkpoint's files show, by the strongest evidence.

    Raises:
        CheckpointError: No format is recognised, or two by evidence of the same strength.
    """
    seen = {
        name: evidence
        for name, format in _FORMATS.items()
        if (evidence := format.detect(snapshot)) is not None
    }
    if not seen:
        raise CheckpointError(
            f"no transcoder format is recognised in {snapshot.where}: it has {snapshot.listing()}. "
            f"If it is one of {', '.join(sorted(_FORMATS))}, say so with format=..."
        )
    best = min(evidence.strength for evidence in seen.values())
    names = [name for name, evidence in seen.items() if evidence.strength == best]
    if len(names) > 1:
        reasons = "; ".join(f"{name}: {seen[name].seen}" for name in names)
        raise CheckpointError(
            f"{snapshot.where} looks like {len(names)} formats ({reasons}); settle it with "
            f"format={' or format='.join(map(repr, names))}"
        )
    return _FORMATS[names[0]]


def _builtin(name: str) -> Snapshot:
    from nnsight_transcoders.builtin import builtin_set_path

    folder = builtin_set_path(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"{name} is missing from this installation; install the package again"
        )
    return LocalSnapshot(folder, {"repository": name, "revision": __version__})

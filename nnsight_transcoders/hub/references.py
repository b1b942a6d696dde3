"""``config.yaml`` with ``transcoders:`` that refers to files in other Hub repositories.

``hf://owner/name/path/to/file?revision=...``, one per layer, in order (circuit-tracer's
``utils/hf_utils.py``). Each repository and revision is resolved to a commit once. A referred file
is read in its own format (Gemma Scope 1 and 2, circuit-tracer's layers), told by its name as in any
repository; the sites and the model are those that ``config.yaml`` names. A reference cannot lead
out of its repository, and no other scheme is followed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.formats import choose_layers
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.layer_sources import LayerSource, Rows
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
#: What ``config.yaml`` says about a file that it refers to.
_PASSED = ("input_site", "output_site", "leading_positions", "base_model")


class Reference(NamedTuple):
    """A file of a repository, at a revision (None: the main branch)."""

    repo_id: str
    file: str
    revision: str | None


def has_references(raw: Mapping[str, Any]) -> bool:
    """Whether a config's ``transcoders:`` names anything by a URL."""
    listed = raw.get("transcoders")
    return isinstance(listed, list) and any(_SCHEME.match(str(name)) for name in listed)


def parse_reference(text: str, where: str) -> Reference:
    """``"hf://owner/name/folder/file?revision=v1"`` -> its parts.

    Raises:
        CheckpointError: Another scheme, or a reference that leads out of its repository.
    """
    try:
        parts = urlsplit(text)
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise CheckpointError(f"{where}: reference {text!r} cannot be read: {error}") from error
    if parts.scheme != "hf":
        raise CheckpointError(
            f"{where}: reference {text!r} is refused: only hf://owner/name/file is followed, and a "
            "list of references cannot hold anything else"
        )
    owner, (name, *path) = parts.netloc, parts.path.lstrip("/").split("/")
    if not (_NAME.match(owner) and _NAME.match(name)) or not path or "" in path:
        raise CheckpointError(
            f"{where}: reference {text!r} is not of the form hf://owner/name/path/to/file"
        )
    if {".", ".."} & {owner, name, *path} or "\\" in text or "%" in parts.path:
        raise CheckpointError(f"{where}: reference {text!r} leads out of its repository; refused")
    unknown = sorted(set(query) - {"revision"})
    if unknown or parts.fragment or len(query.get("revision", [])) > 1:
        raise CheckpointError(
            f"{where}: reference {text!r} has more than a revision: "
            f"{', '.join(unknown) or parts.fragment or 'two revisions'}"
        )
    return Reference(f"{owner}/{name}", "/".join(path), (query.get("revision") or [None])[0])


def open_references(
    snapshot: Snapshot,
    raw: Mapping[str, Any],
    layers: Sequence[int] | None,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
) -> ReferencedSource:
    """Open a set whose layers are files of other repositories.

    Args:
        snapshot: The repository that holds ``config.yaml``.
        raw: What is in it.
        layers: The layers to open.
        fields: Sites, leading positions and model, from ``config.yaml`` and the options.
        options: The format's options.

    Raises:
        CheckpointError: A reference that is refused, cannot be reached, or is of another layer.
    """
    where = f"config.yaml of {snapshot.where}"
    listed = {n: parse_reference(str(text), where) for n, text in enumerate(raw["transcoders"])}
    chosen = choose_layers(listed, layers, snapshot.where)
    if snapshot.open_other is None:
        raise CheckpointError(f"{where} refers to other repositories, which cannot be opened here")
    others: dict[tuple[str, str | None], Snapshot] = {}
    for layer in chosen:
        key = (listed[layer].repo_id, listed[layer].revision)
        if key not in others:
            others[key] = snapshot.open_other(*key)

    def one(layer: int) -> LayerSource:
        reference = listed[layer]
        other = others[reference.repo_id, reference.revision]
        return _open_file(other, reference, layer, fields, options)

    with ThreadPoolExecutor(max_workers=8) as pool:
        sources = dict(zip(chosen, pool.map(one, chosen), strict=True))
    provenance = snapshot.provenance() | {
        "format": "circuit-tracer",
        "config": dict(raw),
        "files": ["config.yaml"],
        "folds": [],
        "references": {str(layer): dict(sources[layer].provenance) for layer in chosen},
    }
    return ReferencedSource(sources, provenance)


def _open_file(
    other: Snapshot,
    reference: Reference,
    layer: int,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
) -> LayerSource:
    """One referred file as a source of one layer, in its own format."""
    from nnsight_transcoders.hub.registry import detect_format

    other.require(reference.file)
    beside = f"{reference.file.rpartition('/')[0]}/config.json".lstrip("/")
    view = copy.copy(other)
    view.complete = True  # the file that is meant, and nothing else
    view.files = (reference.file, *(name for name in other.files if name == beside))
    format = detect_format(view)
    wanted = {**options, **{key: fields[key] for key in _PASSED if fields.get(key) is not None}}
    unusable = sorted(set(options) - set(format.options))
    if unusable:
        raise ConfigError(
            f"{', '.join(unusable)}: of no use for files of format {format.name!r}, to which "
            f"{reference.repo_id} belongs"
        )
    known = {key: value for key, value in wanted.items() if key in format.options}
    source = format.open(view, None, **known)
    if list(source.configs) != [layer]:
        raise CheckpointError(
            f"config.yaml refers to {reference.file} of {other.where} as layer {layer}, but by its "
            f"name it is of layer {', '.join(map(str, source.configs))}"
        )
    return source


class ReferencedSource:
    """A ``LayerSource`` whose layers come from sources of their own."""

    def __init__(self, sources: Mapping[int, LayerSource], provenance: Mapping[str, Any]) -> None:
        self._sources = dict(sorted(sources.items()))
        self.configs = {layer: source.configs[layer] for layer, source in self._sources.items()}
        self.provenance = dict(provenance)

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        return self._sources[layer].load(layer)

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        return self._sources[layer].rows(layer, indices, which)

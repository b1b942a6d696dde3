"""How the graph JSON of Neuronpedia and circuit-tracer names nodes, and text that is safe in it.

``scan``, ``clerp`` and ``jsNodeId`` are that format's words for the model (or set), a node's label
and a node's feature; they are used nowhere else in this package.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from nnsight_transcoders.errors import InputError

if TYPE_CHECKING:
    from nnsight_transcoders.circuits.graph import Node

#: ``feature_type`` by node kind. Per-layer transcoders' features have the cross-layer name, too.
FEATURE_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}
KIND_OF_TYPE = {name: kind for kind, name in FEATURE_TYPES.items()}
#: Vocabulary ids from here on stand for custom target directions: -1, -2, ... as here + 0, + 1, ...
DIRECTIONS = 2**24

_NAME = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
#: Other tools' pages put labels and tokens into HTML. A ``<`` that a letter, ``/``, ``!`` or ``?``
#: follows would open a tag there; with a zero-width space between them it is text. Special tokens
#: stay as they are, since pages know them, and as tags they do nothing.
_SPECIAL = r"/?(?:bos|eos|pad|unk|mask|s|[a-z]+_[a-z_]+)>"
_TAG = re.compile(rf"<(?!{_SPECIAL})(?=[A-Za-z/!?])")
_DEFUSED = "<\u200b"


def cantor(layer: int, feature: int) -> int:
    """One number for a layer and a feature: Cantor's pairing function."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def uncantor(number: int) -> tuple[int, int]:
    """Layer and feature of ``cantor``'s number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def node_id(node: Node, n_layers: int) -> str:
    """A node's id in the JSON. Error nodes have Neuronpedia's names: circuit-tracer's
    ``0_{layer}_{position}`` would also be the id of a feature of layer 0."""
    if node.kind == "feature":
        return f"{node.layer}_{node.index}_{node.position}"
    if node.kind == "error":
        return f"{node.layer}_error_mlp_{node.position}"
    if node.kind == "token":
        return f"E_{node.index}_{node.position}"
    return f"{n_layers + 1}_{vocabulary_id(node.index)}_{node.position}"


def js_node_id(node: Node) -> str:
    """What the pages group nodes by."""
    if node.kind == "feature":
        return f"{node.layer}_{node.index}-0"
    if node.kind == "error":
        return f"{node.layer}_error_mlp_{node.position}-0"
    if node.kind == "token":
        return f"E_{node.index}-{node.position}"
    return f"L_{vocabulary_id(node.index)}-{node.position}"


def vocabulary_id(index: int) -> int:
    """A logit node's index as a number that is not negative."""
    return index if index >= 0 else DIRECTIONS - 1 - index


def target_index(vocabulary: int) -> int:
    """The inverse of ``vocabulary_id``."""
    return vocabulary if vocabulary < DIRECTIONS else DIRECTIONS - 1 - vocabulary


def check_name(what: str, name: str) -> None:
    """Check a name that becomes part of addresses and file names.

    Raises:
        InputError: It has other characters than letters, digits, ``_``, ``.`` and ``-``.
    """
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise InputError(
            f"{what} {name!r}: letters, digits, '_', '.' and '-' only, since it becomes part of an "
            "address"
        )


def defused(text: str) -> str:
    """Text in which no HTML tag starts (but special tokens), and that looks the same."""
    return _TAG.sub(_DEFUSED, text)


def restored(text: str) -> str:
    """Text before ``defused``."""
    return text.replace(_DEFUSED, "<")

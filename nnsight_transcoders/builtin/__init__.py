"""A language model and its transcoders inside the package, small enough to ship.

With them every example runs without a download and every test of a circuit has a model whose
tasks are known (`text`). This module only knows where the files are: importing it loads no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnsight_transcoders.errors import InputError

_FILES = Path(__file__).parent / "files"

#: Name of each transcoder set that comes with the package -> its folder.
BUILTIN_SETS: dict[str, Path] = {
    f"builtin/{kind}": _FILES / kind for kind in ("per-layer", "skip", "clt")
}


def builtin_model_path() -> str:
    """The folder of the builtin language model, in Hugging Face format.

    A string, since nnsight takes any other object for a loaded model.
    """
    return str(_FILES / "model")


def builtin_set_path(name: str) -> Path:
    """The folder of a transcoder set that comes with the package.

    Args:
        name: One of `BUILTIN_SETS`, such as `"builtin/per-layer"`.

    Raises:
        InputError: If there is no such set.
    """
    if name not in BUILTIN_SETS:
        raise InputError(
            f"there is no builtin transcoder set {name!r}; choose one of {', '.join(BUILTIN_SETS)}"
        )
    return BUILTIN_SETS[name]


def record() -> dict[str, Any]:
    """How the builtin model and its sets were trained and what they reach (`docs/builtin.md`)."""
    return json.loads((_FILES / "record.json").read_text(encoding="utf-8"))

"""``nnsight-transcoders``: the command line. Thin: every command is one call of the library.

One module per subject; each registers its commands on ``app``.
"""

from __future__ import annotations

from . import (  # noqa: F401  (registers their commands)
    graphs,
    interop,
    measures,
    paths,
    sets,
    training,
    views,
)
from .app import app

__all__ = ["app"]

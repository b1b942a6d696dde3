"""``python -m nnsight_transcoders``: the command line without an entry point."""

from __future__ import annotations

from .cli import app

app()

"""Runs our code where our package is not installed. Standard library only.

These functions travel as source through nnsight's own serialisation; everything else of ours that
runs in a remote job travels as the text of its modules (``shipping.py``) and is brought to life
here. Text has no Python version, unlike the bytecode that a pickled dataclass would carry, and a
traceback from the server names our files and lines.
"""

from __future__ import annotations

import linecache
import sys
import types
from typing import Any


def run_shipped(sources: dict[str, str], entry: str, args: tuple[Any, ...]) -> Any:
    """Load modules from their text and call one of their functions.

    Args:
        sources: Module name -> its text, what is imported first.
        entry: ``"module:function"``.
        args: What to call it with.
    """
    module, _, name = entry.partition(":")
    return getattr(load_shipped(sources)[module], name)(*args)


def load_shipped(sources: dict[str, str]) -> dict[str, Any]:
    """Modules from their text. ``sys.modules`` is as it was afterwards: a server's process
    outlives the job, and on the client the package itself is in place."""
    before = {name: sys.modules.get(name) for name in sources}
    loaded: dict[str, Any] = {}
    try:
        for name, source in sources.items():
            module = types.ModuleType(name)
            module.__package__ = name.rpartition(".")[0]
            filename = name.replace(".", "/") + ".py"
            lines = source.splitlines(keepends=True)
            linecache.cache[filename] = (len(source), None, lines, filename)
            sys.modules[name] = loaded[name] = module
            exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
    return loaded

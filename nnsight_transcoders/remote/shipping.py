"""What of our code travels to a server that does not have this package.

A function that is to run there names its module; that module and those of ours it imports travel
as text, nothing else. They may import torch and the standard library only, which is checked here
before anything is sent. One small module of plain functions (``loader.py``) travels through
nnsight's serialisation by value; it is registered while a request is made and not afterwards.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle

from nnsight_transcoders.errors import InputError

from . import loader

PACKAGE = "nnsight_transcoders"
#: What shipped modules may import besides each other and the standard library.
AVAILABLE = frozenset({"torch", "tqdm", "nnsight"})


def entry_of(function: Callable[..., Any]) -> str:
    """A module-level function of this package as ``"module:function"``.

    Raises:
        InputError: It is no module-level function.
    """
    if "." in function.__qualname__ or "<" in function.__qualname__:
        raise InputError(
            f"{function.__qualname__} cannot run on a server: it has to stand at the top of a "
            "module"
        )
    return f"{function.__module__}:{function.__name__}"


def shipped_sources(function: Callable[..., Any]) -> dict[str, str]:
    """The text of a function's module and of those it imports, what is imported first.

    Raises:
        InputError: One of them imports what a server may not have.
    """
    names: dict[str, None] = {}
    _visit(function.__module__, names, ())
    return {name: _text(name) for name in names}


def _visit(name: str, done: dict[str, None], path: tuple[str, ...]) -> None:
    if name in done:
        return
    for imported in _imports(name):
        root = imported.partition(".")[0]
        if root == PACKAGE:
            _visit(imported, done, (*path, name))
        elif root not in AVAILABLE and root not in sys.stdlib_module_names:
            raise InputError(
                f"{name} cannot be shipped to a server: it imports {root} "
                f"({' -> '.join((*path, name))}); code that runs there may import "
                f"{', '.join(sorted(AVAILABLE))} and the standard library"
            )
    done[name] = None


@cache
def _text(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InputError(f"the source of {name} cannot be read, so it cannot be shipped")
    return Path(spec.origin).read_text(encoding="utf-8")


@cache
def _imports(name: str) -> tuple[str, ...]:
    """The modules that a module imports when it is run (what is for type checkers is left out)."""
    found = []
    for node in _run_when_imported(ast.parse(_text(name))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            found.append(".".join([*parents, *([node.module] if node.module else [])]))
    return tuple(found)


def _run_when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_when_imported(node)


@contextmanager
def loader_by_value() -> Iterator[None]:
    """Within, nnsight ships the loader by value; afterwards pickling is as it was."""
    import nnsight

    if loader.__name__ in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    nnsight.register(loader)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(loader)

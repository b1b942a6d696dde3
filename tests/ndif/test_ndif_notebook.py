"""``examples/remote.ipynb`` on a real server, by the lines that it says to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell
from ndif_layout import REPO_ID
from ndif_server import Server
from ndif_wire import Wire
from notebook_support import execute, read

pytestmark = pytest.mark.ndif

BEFORE = "from nnsight_transcoders.builtin.text import sentences"
AFTER = """\
assert all(parameter.is_meta for parameter in model._module.parameters())
assert graph.metadata["remote"]["sent_bytes"] > 0
"""


def test_the_notebook(server: Server, wire: Wire, mode: str, tmp_path: Path) -> None:
    book = read("remote")
    changes = {
        'remote = "local"': f'remote = "{wire.url}"',
        "name = builtin_model_path()": f'name = "{REPO_ID}"',
        # Under this name it is any model, which is verified on English that this one cannot read.
        "verify(model, transcoders, ": "verify(model, transcoders, sentences(40), ",
    }
    for old, new in changes.items():
        (cell,) = [cell for cell in book.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    book.cells = [new_code_cell(BEFORE), *book.cells, new_code_cell(AFTER)]
    hub = {"HF_ENDPOINT": server.hub_url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    execute(book, tmp_path, hub | {"NDIF_API_KEY": mode, "NO_PROXY": "127.0.0.1"})

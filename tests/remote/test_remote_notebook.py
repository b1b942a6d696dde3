"""``examples/remote.ipynb`` against a server, by the one line that it says to change."""

from __future__ import annotations

from pathlib import Path

from loopback import Loopback
from nbformat.v4 import new_code_cell
from notebook_support import execute, read

#: The model's id on the server comes from the Hub, which is not asked here (see ``no_hub``).
BEFORE = """\
from nnsight.modeling import huggingface
from nnsight_transcoders import builtin_model_path
huggingface._ID_CACHE[builtin_model_path()] = "test/builtin"
"""
AFTER = """\
assert all(parameter.is_meta for parameter in model._module.parameters())
assert graph.metadata["remote"]["sent_bytes"] > 0
"""


def test_one_line_changed(server: Loopback, tmp_path: Path) -> None:
    book = read("remote")
    (line,) = [cell for cell in book.cells if cell.source == 'remote = "local"']
    line.source = f'remote = "{server.url}"'
    # Traces that the reader writes are sent by nnsight itself, over a websocket that only a real
    # server has (tests/ndif).
    cells = [cell for cell in book.cells if "replaced.trace" not in cell.source]
    assert len(cells) == len(book.cells) - 1
    book.cells = [new_code_cell(BEFORE), *cells, new_code_cell(AFTER)]
    sent = len(server.requests())
    execute(book, tmp_path)
    assert len(server.requests()) >= sent + 6  # verify, features, and two graphs of two each

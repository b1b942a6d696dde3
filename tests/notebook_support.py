"""Executing the notebooks of ``examples/`` in a Jupyter kernel, as a reader would, and the form in
which they are committed. ``python tests/notebook_support.py`` brings them all into that form."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

EXAMPLES = Path(__file__).parent.parent / "examples"
#: Seconds for a cell, on a machine that does other things too.
TIMEOUT = 300
#: No network, one thread, and nothing of the user's own IPython.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def read(name: str) -> NotebookNode:
    """A notebook of the examples."""
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    return book


def clean(book: NotebookNode) -> str:
    """The file's text without anything that running it leaves behind, so that a change of the
    notebook is a change of its sources."""
    cells = []
    for cell in book.cells:
        kept = {"cell_type": cell.cell_type, "id": cell.id, "metadata": {}, "source": cell.source}
        if cell.cell_type == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(kept)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.writes(nbformat.from_dict(content)) + "\n"


def execute(
    book: NotebookNode, folder: Path, environment: Mapping[str, str] | None = None
) -> NotebookNode:
    """Run all cells in a new kernel of this Python, in a copy of the examples; the outputs are put
    into ``book``. A cell that raises ends it with ``CellExecutionError``.

    Args:
        book: The notebook.
        folder: An empty folder.
        environment: Variables of the kernel, over those that all notebooks run with.
    """
    work = folder / "examples"
    work.mkdir()
    for script in EXAMPLES.glob("*.py"):
        shutil.copy(script, work)
    own = {"IPYTHONDIR": str(folder / "ipython")}
    variables = {**os.environ, **ENVIRONMENT, **own, **(environment or {})}
    # Sockets in a folder, whose name must be short: no port that another process could take.
    with tempfile.TemporaryDirectory(prefix="nb") as sockets:
        manager = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        client = NotebookClient(
            book,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
            config=Config({"KernelManager": manager}),
        )
        return client.execute(env=variables)


def outputs(book: NotebookNode, kind: str) -> list[str]:
    """All outputs of a MIME type, such as ``text/html``, in order."""
    cells = (cell for cell in book.cells if cell.cell_type == "code")
    found = (output.get("data", {}) for cell in cells for output in cell.outputs)
    return [data[kind] for data in found if kind in data]


if __name__ == "__main__":
    for path in EXAMPLES.glob("*.ipynb"):
        path.write_text(clean(read(path.stem)), encoding="utf-8")

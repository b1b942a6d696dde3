"""The notebooks of ``examples/``: each is executed in a Jupyter kernel, where its own asserts hold
it to what it says, and is committed without outputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from notebook_support import EXAMPLES, clean, execute, outputs, read

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
DOCS = EXAMPLES.parent / "docs"


@dataclass(frozen=True)
class Shown:
    """What a notebook has to show: graph pages, plotly figures, printed texts, files."""

    pages: int
    figures: int
    texts: tuple[str, ...]
    files: tuple[str, ...] = ()


EXPECTED = {
    "quickstart": Shown(1, 1, ("layer 3: FVU", "Feature "), ("circuit.html", "features")),
    "remote": Shown(1, 0, ("COMPLETED", "of the largest edge")),
    "greater_than": Shown(0, 5, ("features: ", "neurons: ")),
    "train": Shown(0, 2, ("rec. mean", "base_model"), ("run/log.jsonl", "my-transcoders")),
    "two_hop": Shown(1, 3, ("180 of 180", "Spearman"), ("two_hop.html",)),
}


def test_every_notebook_is_tested_and_listed() -> None:
    assert sorted(EXPECTED) == NAMES
    page = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"`{name}.ipynb`" in page, f"docs/notebooks.md says nothing of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs(name: str) -> None:
    text = (EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == clean(read(name)), "run: python tests/notebook_support.py"


@pytest.mark.parametrize("name", NAMES)
def test_names_only_files_that_exist(name: str) -> None:
    cells = read(name).cells
    assert cells[0].source.startswith("# ")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for page in re.findall(r"docs/\w+\.md", text):
        assert (EXAMPLES.parent / page).exists(), page
    for other in re.findall(r"\]\((\w+\.ipynb)\)", text):
        assert (EXAMPLES / other).exists(), other


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, tmp_path: Path) -> None:
    book = execute(read(name), tmp_path)
    expected = EXPECTED[name]
    pages = [html for html in outputs(book, "text/html") if "<iframe" in html]
    assert len(pages) == expected.pages
    assert len(outputs(book, "application/vnd.plotly.v1+json")) == expected.figures
    printed = "".join(
        output.text
        for cell in book.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    for text in expected.texts:
        assert text in printed
    for file in expected.files:
        assert (tmp_path / "examples" / file).exists(), file

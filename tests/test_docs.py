"""The documentation runs: every Python block of every page, the site itself, and its lists.

The blocks of a page are one program, run in order in an empty folder and a process of its own.
They are written to a file, since nnsight reads the source of a trace's block, and each block keeps
its line of the page, so that a traceback points into the page.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import nnsight_transcoders
from nnsight_transcoders import errors
from nnsight_transcoders.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("README.md")])
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S
)
TIMEOUT = 300
#: No network; and one thread, since threads that wait for each other cost most of the time of
#: matrices this small when other processes use the cores.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


@dataclass(frozen=True)
class Block:
    """A Python block of a page: the number of its first line, its text, and whether it is run."""

    line: int
    code: str
    run: bool


def python_blocks(page: str) -> list[Block]:
    """The blocks whose info string begins with ``python``; ``no-run`` in it is for reading only."""
    blocks = []
    for found in FENCE.finditer(page):
        language, *words = found["info"].replace("{", " ").replace("}", " ").split() or [""]
        if language in ("python", "py"):
            line = page.count("\n", 0, found.start("body")) + 1
            blocks.append(Block(line, textwrap.dedent(found["body"]), "no-run" not in words))
    return blocks


def program(blocks: list[Block]) -> str:
    """The blocks that are run as one program in which each stands on its line of the page."""
    lines: list[str] = []
    for block in blocks:
        if block.run:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def test_blocks_are_found_with_their_lines() -> None:
    page = "# T\n```python\na = 1\n```\n\n  ```python no-run\n  b\n  ```\n```bash\nls\n```\n"
    page += "```python\nc = a\n```\n"
    blocks = python_blocks(page)
    assert blocks == [Block(3, "a = 1\n", True), Block(7, "b\n", False), Block(13, "c = a\n", True)]
    assert program(blocks).splitlines()[2] == "a = 1"
    assert program(blocks).splitlines()[12] == "c = a"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_compiles(page: Path) -> None:
    for block in python_blocks(page.read_text(encoding="utf-8")):
        code = "\n" * (block.line - 1) + block.code
        compile(code, name_of(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


RUN = [page for page in PAGES if any(b.run for b in python_blocks(page.read_text("utf-8")))]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_every_page_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / f"{page.stem}.py"
    script.write_text(program(python_blocks(page.read_text(encoding="utf-8"))), encoding="utf-8")
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"{name_of(page)}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings")):
        pytest.skip("needs the extra 'docs'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    api = (tmp_path / "site/api/circuits/index.html").read_text(encoding="utf-8")
    assert "max_feature_nodes" in api


def test_the_command_line_page_has_every_command_and_option() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        section = re.search(rf"^## `{name}`$(.*?)(?=^## |\Z)", page, re.M | re.S)
        assert section, f"docs/cli.md has no section `{name}`"
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f"`{option}" in section[1], f"docs/cli.md says nothing of {name} {option}"


def test_the_errors_page_has_every_error() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.TranscoderError)
        assert f"## `{name}`" in page


def test_the_reference_has_every_public_name() -> None:
    reference = "\n".join(p.read_text(encoding="utf-8") for p in DOCS.glob("api/*.md"))
    for name in set(nnsight_transcoders.__all__) - {"__version__"}:
        assert re.search(rf"^::: nnsight_transcoders\.[\w.]+\.{name}$", reference, re.M), name


def test_no_link_of_the_readme_is_broken() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith(("http://", "https://")) or (ROOT / target).exists(), target

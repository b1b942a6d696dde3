"""The catalogue: its entries make sense, the command shows them, and the page agrees with it."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnsight_transcoders.catalogue import CatalogueEntry, catalogue
from nnsight_transcoders.cli import app, output
from nnsight_transcoders.hub.registry import known_formats

PAGE = Path(__file__).parents[1] / "docs" / "catalogue.md"


def row(entry: CatalogueEntry) -> str:
    """An entry as a line of the page's table; a star marks what no source states."""

    def cell(name: str) -> str:
        value = getattr(entry, name)
        return ("?" if value is None else str(value)) + ("*" if name in entry.unverified else "")

    names = ("base_model", "layers", "width", "kind", "activation", "sites", "format", "licence")
    cells = [f"`{entry.repository}`", *map(cell, names), entry.remark or "–"]
    return f"| {' | '.join(cells)} |"


def test_the_page_agrees() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if re.match(r"^\| `.+/.+` \|", line)]
    assert table == [row(entry) for entry in catalogue()]


def test_entries_make_sense() -> None:
    formats = known_formats()
    names = {field.name for field in fields(CatalogueEntry)}
    seen = set()
    for entry in catalogue():
        assert entry.format in formats
        assert entry.kind in ("per-layer", "skip", "cross-layer")
        assert re.fullmatch(r"[\w.-]+/[\w.*-]+", entry.repository)
        assert entry.sites is None or re.fullmatch(r"(R|N0|N1) -> O'?", entry.sites)
        assert set(entry.unverified) <= names
        for name in entry.unverified:
            assert getattr(entry, name) is not None, "an unknown is None, not unverified"
        assert "|" not in entry.remark
        seen.add((entry.repository, entry.kind))
    assert len(seen) == len(catalogue())
    json.dumps([entry.to_dict() for entry in catalogue()])


@pytest.mark.parametrize(
    "named",
    [
        "pchlenski/gpt2-transcoders",
        "jacobdunefsky/gpt2small-transcoders",
        "jacobdunefsky/pythia-2.8B-transcoders",
        "google/gemma-scope-2b-pt-transcoders",
        *(
            f"google/gemma-scope-2-{s}-{k}"
            for s in "270m 1b 4b 12b 27b".split()
            for k in ("pt", "it")
        ),
        "EleutherAI/skip-transcoder-Llama-3.2-1B-131k",
        "EleutherAI/skip-transcoder-SmolLM2-135M-128x",
        "mntss/transcoder-Llama-3.2-1B",
        "mwhanna/qwen3-14b-transcoders-lowl0",
        "facebook/crv-8b-instruct-transcoders",
        "mntss/gemma-scope-transcoders",
        "mwhanna/gemma-scope-2-*",
        "sackfield/qwen2.5-0.5b-transcoders",
        "OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B",
        "noanabeshima/tiny_model",
        "mntss/clt-gemma-2-2b-426k",
        "mntss/clt-gemma-2-2b-2.5M",
        "mntss/clt-llama-3.2-1b-524k",
        "mntss/clt-131k",
        "bluelightai/clt-qwen3-*",
        "EleutherAI/*-clt-*",
        "ByteDance-Seed/Cross-Layer-TopK-CLT",
    ],
)
def test_every_public_set_is_there(named: str) -> None:
    assert named in {entry.repository for entry in catalogue()}


def test_the_set_without_its_constants_says_so() -> None:
    (entry,) = catalogue("SmolLM2")
    assert "Does not reconstruct without its normalisation constants" in entry.remark


def test_filter() -> None:
    assert catalogue("no such model") == ()
    assert {entry.base_model for entry in catalogue("GEMMA-2-2B")} == {"google/gemma-2-2b"}


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    monkeypatch.setattr(output.out, "_width", 120)
    shown = runner.invoke(app, ["list", "--base-model", "llama-3.2"])
    assert shown.exit_code == 0
    assert "mntss/transcoder-Llama-3.2-1B" in shown.stdout
    assert "gemma" not in shown.stdout
    data = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert data["sets"] == json.loads(json.dumps([entry.to_dict() for entry in catalogue()]))
    none = runner.invoke(app, ["list", "--base-model", "nothing"])
    assert none.exit_code == 0
    assert "0 sets" in none.stdout

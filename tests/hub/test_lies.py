"""safetensors headers that lie and files that lead elsewhere are refused, whatever the format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.sets import TranscoderSet

from .builders import BUILDERS


def rewrite(
    path: Path, change: Callable[[dict[str, Any]], None], length: int | None = None
) -> None:
    """Change a safetensors header; the data stays."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    claimed = len(text) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + text + data[8 + size :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[sorted(name for name in header if name != "__metadata__")[0]]


#: Formats without safetensors files.
OTHER = {"dunefsky", "gemma-scope", "tiny-model"}

LIES: dict[str, tuple[Callable[[dict[str, Any]], None], int | None]] = {
    "a header longer than the file": (lambda _: None, 1 << 62),
    "a header longer than any": (lambda _: None, (1 << 64) - 1),
    "data beyond the end": (lambda h: first(h).update(data_offsets=[0, 1 << 40]), None),
    "data before the start": (lambda h: first(h).update(data_offsets=[-8, 8]), None),
    "a shape of more than the data": (lambda h: first(h).update(shape=[1 << 40, 1 << 20]), None),
    "a shape of less than the data": (lambda h: first(h).update(shape=[1]), None),
    "a type that is none": (lambda h: first(h).update(dtype="PICKLE"), None),
    "no shape": (lambda h: first(h).pop("shape"), None),
}


def opened(folder: Path, options: dict[str, Any]) -> None:
    found = TranscoderSet.from_pretrained(folder, cache_dir=folder.parent / "cache", **options)
    for layer in found.layers:
        found[layer]


@pytest.mark.parametrize("name", sorted(n for n in BUILDERS if n.split(":")[0] not in OTHER))
@pytest.mark.parametrize("lie", sorted(LIES))
def test_headers_that_lie(lie: str, name: str, tmp_path: Path) -> None:
    options = BUILDERS[name](tmp_path / "set")
    files = sorted((tmp_path / "set").rglob("*.safetensors"))
    rewrite(files[-1], *LIES[lie])
    with pytest.raises(CheckpointError, match=r"cannot be read|not a complete safetensors"):
        opened(tmp_path / "set", options)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_links_that_lead_out(name: str, tmp_path: Path) -> None:
    """Every file in turn is a link to a copy outside of the folder."""
    options = BUILDERS[name](tmp_path / "set")
    for path in sorted(p for p in (tmp_path / "set").rglob("*") if p.is_file()):
        outside = tmp_path / "outside"
        shutil.move(path, outside)
        path.symlink_to(outside)
        if path.name not in ("README.md", "norm_stats.json", "lm_config.json"):
            with pytest.raises(CheckpointError, match="outside of the checkpoint"):
                opened(tmp_path / "set", options)
        path.unlink()
        shutil.move(outside, path)
    opened(tmp_path / "set", options)

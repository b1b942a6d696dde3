"""Reading single rows touches those rows only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnsight_transcoders.hub.tensors import read_header, read_rows, runs

from .checkpoints import random, write_tensors


def test_runs() -> None:
    assert runs([]) == []
    assert runs([3, 4, 5, 9]) == [(3, 6), (9, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_columns(dtype: torch.dtype, tmp_path: Path) -> None:
    w = random(1, 9, 5, dtype=dtype)
    write_tensors(tmp_path / "w.safetensors", {"rows": w, "columns": w.T})
    for indices in ([8, 2, 3, 3, 0], [], list(range(9)), [4]):
        at = torch.tensor(indices, dtype=torch.long)
        assert torch.equal(read_rows(tmp_path / "w.safetensors", "rows", at), w[at])
        columns = read_rows(tmp_path / "w.safetensors", "columns", at, transposed=True)
        assert torch.equal(columns, w[at])


def resident_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
def test_rows_of_a_large_file_read_little(tmp_path: Path) -> None:
    """A sparse file of 1 GiB: reading all of it would map all of its pages."""
    features, width = 1 << 18, 1024
    path = tmp_path / "large.safetensors"
    size = features * width * 4
    header = json.dumps(
        {"W": {"dtype": "F32", "shape": [features, width], "data_offsets": [0, size]}}
    )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    assert read_header(path)["W"].shape == (features, width)
    before = resident_megabytes()
    indices = torch.cat([torch.arange(100), torch.tensor([features // 2, features - 1])])
    rows = read_rows(path, "W", indices)
    assert rows.shape == (102, width)
    assert rows.untyped_storage().nbytes() == rows.nbytes
    assert resident_megabytes() - before < 32

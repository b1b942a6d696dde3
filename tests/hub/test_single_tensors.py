"""Single tensors of checkpoints on the Hub: only their bytes are asked for, and only once."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save
from torch import Tensor

from nnsight_transcoders import attribute
from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import single_tensors
from nnsight_transcoders.hub.hub_snapshot import open_snapshot

from .hub_server import Fault, HubServer

sys.path.insert(0, str(Path(__file__).parents[1] / "circuits"))

from setups import IDS, model, transcoders

REPO, FILE = "someone/model", "model.safetensors"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is asked for at once, and no time is lost."""
    monkeypatch.setattr(single_tensors, "FIRST", 512)
    monkeypatch.setattr(single_tensors, "PIECE", 1000)
    monkeypatch.setattr(single_tensors, "PAUSES", (0.0, 0.0))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        found[f"layer.{number}.weight"] = torch.randn(30, 20, generator=generator).to(dtype)
    return {**found, "scalar": torch.tensor(3.0), "nothing": torch.zeros(0, 4)}


def test_only_what_is_asked_for_is_read(hub: HubServer, tensors: dict[str, Tensor]) -> None:
    hub.add(REPO, {FILE: save(tensors)})
    snapshot = open_snapshot(REPO)
    for name, expected in tensors.items():
        hub.requests.clear()
        found = snapshot.tensor(FILE, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        header = 1000 if name == "layer.0.weight" else 0  # once, in two parts
        assert hub.downloads().get(FILE, 0) <= expected.nbytes + header
    hub.requests.clear()
    again = open_snapshot(REPO)
    assert torch.equal(again.tensor(FILE, "layer.1.weight"), tensors["layer.1.weight"])
    assert hub.downloads()[FILE] <= 1000  # it is kept: the header only


def test_a_kept_tensor_that_is_damaged_is_read_again(
    hub: HubServer, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    hub.add(REPO, {FILE: save(tensors)})
    open_snapshot(REPO).tensor(FILE, "layer.0.weight")
    (kept,) = (tmp_path / "assets").rglob("*@tensor.safetensors")
    kept.write_bytes(kept.read_bytes()[:-7])
    found = open_snapshot(REPO).tensor(FILE, "layer.0.weight")
    assert torch.equal(found, tensors["layer.0.weight"])


def test_a_file_in_the_cache_is_used(hub: HubServer, tensors: dict[str, Tensor]) -> None:
    hub.add(REPO, {FILE: save(tensors)})
    snapshot = open_snapshot(REPO)
    snapshot.path(FILE)
    hub.requests.clear()
    assert torch.equal(snapshot.tensor(FILE, "layer.0.weight"), tensors["layer.0.weight"])
    assert not hub.downloads()
    with pytest.raises(CheckpointError, match="has no tensor layer.9"):
        snapshot.tensor(FILE, "layer.9")


def test_a_place_that_cannot_be_written(
    hub: HubServer, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """Then nothing is kept."""
    hub.add(REPO, {FILE: save(tensors)})
    (tmp_path / "assets").write_text("a file")
    found = open_snapshot(REPO).tensor(FILE, "layer.0.weight")
    assert torch.equal(found, tensors["layer.0.weight"])


@pytest.mark.parametrize("status", [0, 503], ids=["cut", "down"])
def test_what_did_not_arrive_is_asked_for_again(
    hub: HubServer, tensors: dict[str, Tensor], status: int
) -> None:
    hub.add(REPO, {FILE: save(tensors)})
    snapshot = open_snapshot(REPO)
    snapshot.tensor(FILE, "scalar")
    hub.faults.append(Fault("/resolve/", status, times=2))
    assert torch.equal(snapshot.tensor(FILE, "layer.0.weight"), tensors["layer.0.weight"])
    hub.faults.append(Fault("/resolve/", status, times=3))
    with pytest.raises(CheckpointError):
        snapshot.tensor(FILE, "layer.1.weight")


def test_what_is_refused_is_not_asked_for_again(hub: HubServer, tensors: dict[str, Tensor]) -> None:
    repo = hub.add(REPO, {FILE: save(tensors)})
    snapshot = open_snapshot(REPO)
    snapshot.tensor(FILE, "scalar")
    repo.gated = True
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="ask for access"):
        snapshot.tensor(FILE, "layer.0.weight")
    assert len(hub.requests) == 1


def with_header(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK", "no header"),
        (struct.pack("<Q", 2**60) + bytes(100), "no header"),
        (with_header(b"{" * 40), "no safetensors file"),
        (with_header([1, 2]), "its header is no object"),
        (with_header({"w": 3}), "has no tensor w"),
        (with_header({"w": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}), "dtype I8"),
        (with_header({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}), "be read"),
        (with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}), "be read"),
        (with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}), "16 bytes"),
        (with_header({"w": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}), "of "),
    ],
)
def test_headers_that_lie(hub: HubServer, content: bytes, message: str) -> None:
    hub.add(REPO, {FILE: content})
    with pytest.raises(CheckpointError, match=message):
        open_snapshot(REPO).tensor(FILE, "w")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_graph_reads_few_tensors_of_a_checkpoint(
    hub: HubServer, name: str, tmp_path: Path
) -> None:
    """Values, output projections and the unembedding, of shards that are not downloaded."""
    nn_model, chosen = model(name), transcoders(name, "per-layer")
    nn_model._module.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    shards = {n: content for n, content in files.items() if n.endswith(".safetensors")}
    assert len(shards) > 2
    hub.add(REPO, files)
    hub.requests.clear()
    found = attribute(nn_model, chosen, list(IDS), remote="local", weights=REPO)
    assert found.metadata["remote"]["edges"].startswith(f"client ({REPO}")
    expected = attribute(nn_model, chosen, list(IDS))
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-6)
    # Llama: two value heads of width 8. GPT-2: queries, keys and values in one, and biases.
    width = zoo.D_MODEL
    layer = 16 * width + width * width if name == "llama" else 4 * width * (width + 1)
    needed = 4 * (zoo.N_LAYERS * layer + zoo.VOCAB * width)
    read = sum(n for file, n in hub.downloads().items() if file in shards)
    whole = sum(map(len, shards.values()))
    headers = sum(1000 + struct.unpack("<Q", content[:8])[0] for content in shards.values())
    assert needed <= read <= needed + headers < whole

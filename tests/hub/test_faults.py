"""What goes wrong on the way: cut connections, refusals, servers that stumble, files cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.circuit_tracer import save_circuit_tracer
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import folder_bytes, make_set
from .hub_server import Fault, HubServer

open_set = TranscoderSet.from_pretrained
WEIGHTS = r"/resolve/.*/layer_1\.safetensors$"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A circuit-tracer checkpoint whose layers are large beside their headers."""
    made = make_set((0, 1, 2), d_transcoder=8192)
    return folder_bytes(save_circuit_tracer(made, tmp_path / "local"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between its own retries."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


def intact(opened: TranscoderSet, layer: int) -> bool:
    expected = make_set((layer,), d_transcoder=8192)[layer]
    return torch.equal(opened[layer].W_dec, expected.W_dec)


def test_a_cut_connection_is_taken_up_again(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # 10 MB otherwise
    hub.add("me/set", files)
    opened = open_set("me/set", layers=[1])
    hub.faults.append(Fault(WEIGHTS, 0))
    hub.requests.clear()
    assert intact(opened, 1)
    asked = [{k.lower(): v for k, v in r.headers.items()}.get("range") for r in hub.requests]
    assert any(where and where != "bytes=0-" for where in asked), "it started all over"


def test_a_connection_that_stays_cut(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.add("me/set", files)
    opened = open_set("me/set", layers=[1])
    hub.faults.append(Fault(WEIGHTS, 0, times=10**6))
    with pytest.raises(CheckpointError, match="(?s)me/set: .*Next: check the connection"):
        opened[1]
    hub.faults.clear()
    assert intact(opened, 1)


def test_cut_while_the_header_is_read(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.add("me/set", files)
    hub.faults.append(Fault(WEIGHTS, 0, times=10**6))
    with pytest.raises(CheckpointError, match="(?s)me/set: .*Next: "):
        open_set("me/set")
    hub.faults.clear()
    assert intact(open_set("me/set"), 1)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_that_stumbles_once(
    status: int, method: str, hub: HubServer, files: dict[str, bytes]
) -> None:
    hub.add("me/set", files)
    opened = open_set("me/set", layers=[1])
    hub.faults.append(Fault(WEIGHTS, status, method=method))
    try:
        assert intact(opened, 1)
    except CheckpointError as error:
        assert "Next: " in str(error)  # the client does not repeat every kind of request
        assert intact(opened, 1)
    assert hub.faults[0].times == 0


def test_a_server_that_stumbles_at_the_start(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.add("me/set", files)
    hub.faults.append(Fault("^/api/models/me/set", 503, times=10**6))
    with pytest.raises(CheckpointError, match="(?s)me/set.*Next: "):
        open_set("me/set")
    hub.faults.clear()
    opened = open_set("me/set")
    assert intact(opened, 1)
    hub.faults.append(Fault("^/api/models/me/set", 503, times=10**6))
    assert intact(open_set("me/set"), 1)  # from the cache


def test_refused_in_the_middle(hub: HubServer, files: dict[str, bytes]) -> None:
    repo = hub.add("me/set", files)
    opened = open_set("me/set")
    repo.private = True  # access is withdrawn after opening
    with pytest.raises(CheckpointError, match=r"(?s)me/set: .*401.*hf auth login"):
        opened[0]
    with pytest.raises(CheckpointError, match="(?s)401.*hf auth login, or pass token=|hf auth"):
        open_set("me/set", token="hf_wrong")
    repo.private, repo.gated = False, True
    with pytest.raises(CheckpointError, match="ask for access on the page of me/set"):
        opened[0]
    repo.gated = False
    assert intact(opened, 0)


def test_a_file_that_is_gone(hub: HubServer, files: dict[str, bytes]) -> None:
    repo = hub.add("me/set", files)
    opened = open_set("me/set")
    del repo.commits[repo.refs["main"]]["layer_1.safetensors"]
    with pytest.raises(CheckpointError, match="(?s)404.*Next: check the file list"):
        opened[1]
    assert intact(opened, 0)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_that_is_cut_off_on_the_hub(
    keep: int, hub: HubServer, files: dict[str, bytes]
) -> None:
    name = "layer_1.safetensors"
    hub.add("me/set", files | {name: files[name][:keep]})
    with pytest.raises(CheckpointError, match="damaged|not a complete|expected|Next: "):
        open_set("me/set")[1]
    assert intact(open_set("me/set", layers=[0]), 0)


def test_a_file_that_is_cut_off_in_the_cache(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.add("me/set", files)
    open_set("me/set", layers=[1])[1]
    (cached,) = Path(constants.HF_HUB_CACHE).glob("**/snapshots/*/layer_1.safetensors")
    blob = cached.resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a complete safetensors file .* delete"):
        open_set("me/set", layers=[1])
    blob.unlink()
    cached.unlink()
    assert intact(open_set("me/set", layers=[1]), 1)


def test_a_repository_that_changes_between_two_files(
    hub: HubServer, files: dict[str, bytes]
) -> None:
    repo = hub.add("me/set", files)
    first = repo.refs["main"]
    opened = open_set("me/set")
    assert intact(opened, 0)
    other = folder_bytes_of_other_shape(files)
    repo.commit(other)
    assert intact(opened, 1)
    assert opened.provenance["revision"] == first
    asked = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert all(f"/resolve/{first}/" in path for path in asked)
    with pytest.raises(CheckpointError):
        open_set("me/set")
    assert intact(open_set("me/set", revision=first), 2)


def folder_bytes_of_other_shape(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same names with content that does not fit together."""
    return {name: b"something else" for name in files if name.endswith(".safetensors")}

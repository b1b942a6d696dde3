"""Files that are converted once: kept per commit or file state, lazily, and replaced whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from nnsight_transcoders.errors import CheckpointError, TranscoderError
from nnsight_transcoders.hub import converted, remote_file
from nnsight_transcoders.sets import TranscoderSet

from . import hub_server
from . import test_dunefsky as dunefsky
from . import test_gemma_scope as gemma
from .checkpoints import folder_bytes, random
from .hub_server import HubServer

D, F = 6, 20
REPO = "owner/scope"


def copies(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def opened(folder: Path, **options: Any) -> TranscoderSet:
    return TranscoderSet.from_pretrained(folder, cache_dir=folder.parent / "cache", **options)


def test_a_folder_is_converted_layer_by_layer(tmp_path: Path, monkeypatch: Any) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    for layer in (0, 1, 2):
        gemma.write_layer(folder, layer, 9, gemma.arrays(layer))
    found = opened(folder)
    assert not copies(cache)
    found[1]
    assert len(copies(cache)) == 1
    found.rows(2, [3])
    assert len(copies(cache)) == 2
    assert not list(cache.rglob("*.part"))

    def fail(*_: Any) -> Any:
        raise AssertionError("converted again")

    monkeypatch.setattr(converted, "write_tensors", fail)
    again = opened(folder)
    assert torch.equal(again[1].W_enc, found[1].W_enc)
    assert torch.equal(again.rows(2, [3]), found.rows(2, [3]))


def test_a_changed_file_is_converted_again(tmp_path: Path) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    path = gemma.write_layer(folder, 0, 9, gemma.arrays(0))
    first = opened(folder)[0].W_enc.clone()
    gemma.write_layer(folder, 0, 9, gemma.arrays(7))
    os.utime(path, ns=(1, 1))
    second = opened(folder)[0].W_enc.clone()
    assert not torch.equal(first, second)
    assert torch.equal(second, gemma.arrays(7)["W_enc"].T)
    assert len(copies(cache)) == 1  # the copy of the earlier state is gone
    copies(cache)[0].write_bytes(b"cut off")
    assert torch.equal(opened(folder)[0].W_enc, second)
    # Changed between opening and loading: the copy does not fit what was opened.
    late = opened(folder)
    wider = {**gemma.arrays(0), "W_enc": random(1, D, 21), "W_dec": random(1, 21, D)}
    wider |= {"b_enc": random(1, 21), "threshold": random(1, 21)}
    gemma.write_layer(folder, 0, 9, wider)
    with pytest.raises(CheckpointError, match="has shape"):
        late[0]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    gemma.write_layer(tmp_path / "set", 0, 9, gemma.arrays(0))
    (tmp_path / "file").write_text("")
    found = TranscoderSet.from_pretrained(tmp_path / "set", cache_dir=tmp_path / "file")
    with pytest.raises(TranscoderError, match="no place for it.*cache_dir="):
        found[0]


def test_without_cache_dir_the_assets_of_the_hub_client(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    gemma.write_layer(tmp_path / "set", 0, 9, gemma.arrays(0))
    TranscoderSet.from_pretrained(tmp_path / "set")[0]
    assert len(copies(tmp_path / "assets" / "nnsight-transcoders")) == 1


def big(seed: int) -> dict[str, torch.Tensor]:
    """Weights whose files are longer than what opening asks for."""
    width = 2000
    return {
        "W_enc": random(seed, 64, width),
        "W_dec": random(seed + 1, width, 64),
        "b_enc": random(seed + 2, width),
        "b_dec": random(seed + 3, 64),
        "threshold": random(seed + 4, width).abs(),
    }


def test_from_the_hub(hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
    """Opening reads the ends and heads of files; a layer is downloaded when it is used."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    for layer in (0, 1, 2):
        gemma.write_layer(tmp_path / "set", layer, 9, big(layer))
    files = folder_bytes(tmp_path / "set")
    size = len(files["layer_0/width_16k/average_l0_9/params.npz"])
    repo = hub.add(REPO, files)
    found = TranscoderSet.from_pretrained(REPO, layers=[0, 2])
    assert set(hub.downloads()) == {f"layer_{n}/width_16k/average_l0_9/params.npz" for n in (0, 2)}
    assert max(hub.downloads().values()) <= 5 * remote_file.BLOCK < size
    hub.requests.clear()
    assert torch.equal(found[2].W_enc, big(2)["W_enc"].T)
    assert hub.downloads() == {"layer_2/width_16k/average_l0_9/params.npz": size}
    assert found.provenance["revision"] == repo.refs["main"]
    assert len(copies(tmp_path / "assets")) == 1
    # From the cache alone, and the copy is used.
    hub.requests.clear()
    again = TranscoderSet.from_pretrained(REPO, layers=[2], local_files_only=True)
    assert torch.equal(again[2].W_dec, big(2)["W_dec"])
    assert not hub.downloads()
    # Another commit is another copy.
    gemma.write_layer(tmp_path / "set", 2, 9, big(50))
    repo.commit(folder_bytes(tmp_path / "set"))
    assert torch.equal(TranscoderSet.from_pretrained(REPO)[2].W_dec, big(50)["W_dec"])
    assert torch.equal(
        TranscoderSet.from_pretrained(REPO, revision=found.provenance["revision"])[2].W_dec,
        big(2)["W_dec"],
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_from_the_hub(
    legacy: bool, hub: HubServer, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    width = 20_000
    state = {
        "W_enc": random(0, D, width),
        "b_enc": random(1, width),
        "W_dec": random(2, width, D),
        "b_dec": random(3, D),
        "b_dec_out": random(4, D),
    }
    path = dunefsky.write_layer(tmp_path / "set", 4, state, legacy=legacy)
    hub.add(REPO, folder_bytes(tmp_path / "set"))
    found = TranscoderSet.from_pretrained(REPO)
    assert found.config(4).d_transcoder == width
    assert sum(hub.downloads().values()) <= 5 * remote_file.BLOCK < path.stat().st_size
    assert torch.equal(found.rows(4, [width - 1]), state["W_dec"][-1:])


def test_a_server_without_ranges(hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
    gemma.write_layer(tmp_path / "set", 0, 9, gemma.arrays(0))
    hub.add(REPO, folder_bytes(tmp_path / "set"))
    monkeypatch.setattr(hub_server._Handler, "handle_request", _without_ranges)
    with pytest.raises(CheckpointError, match="does not send parts of files"):
        TranscoderSet.from_pretrained(REPO)


_handle = hub_server._Handler.handle_request


def _without_ranges(handler: Any, body: bytes) -> None:
    del handler.headers["Range"]
    _handle(handler, body)


def test_the_hub_refuses(hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
    gemma.write_layer(tmp_path / "set", 0, 9, gemma.arrays(0))
    hub.add(REPO, folder_bytes(tmp_path / "set"))
    refuse = hub_server._Handler.refuse
    monkeypatch.setattr(
        hub_server._Handler, "file", lambda handler, *_: refuse(handler, 404, "EntryNotFound")
    )
    with pytest.raises(CheckpointError, match="Next: check the file list of this revision"):
        TranscoderSet.from_pretrained(REPO)

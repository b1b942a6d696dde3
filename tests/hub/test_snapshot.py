"""Folders and repositories: one commit, few downloads, no way out, errors that help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.circuit_tracer import save_circuit_tracer
from nnsight_transcoders.hub.snapshot import LocalSnapshot
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import folder_bytes, make_set
from .hub_server import TOKEN, HubServer

open_set = TranscoderSet.from_pretrained


def native_files(tmp_path: Path, **fields: object) -> dict[str, bytes]:
    """The files of a native checkpoint whose layers are large beside their headers."""
    made = make_set((0, 1, 2), d_transcoder=4096, **fields)
    return folder_bytes(made.save_pretrained(tmp_path / "local"))


# -- what is downloaded ------------------------------------------------------------------------


def test_only_what_is_used_comes_down(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/set", native_files(tmp_path))
    opened = open_set("me/set", layers=[0, 2])
    assert opened.layers == (0, 2)
    assert set(hub.downloads()) == {"config.json"}
    opened.rows(2, [1, 2])
    assert set(hub.downloads()) == {"config.json", "layer_2.safetensors"}
    before = hub.downloads()
    opened[2]
    assert hub.downloads() == before
    open_set("me/set")[0]
    assert set(hub.downloads()) == {"config.json", "layer_2.safetensors", "layer_0.safetensors"}
    assert hub.downloads()["config.json"] == before["config.json"]


def test_opening_reads_headers_by_range(hub: HubServer, tmp_path: Path) -> None:
    made = make_set((0, 1, 2), d_transcoder=8192)
    save_circuit_tracer(made, tmp_path / "local")
    hub.add("me/set", folder_bytes(tmp_path / "local"))
    opened = open_set("me/set", layers=[1, 2])
    assert opened.config(1).d_transcoder == 8192
    sent = hub.downloads()
    assert set(sent) == {"config.yaml", "layer_1.safetensors", "layer_2.safetensors"}
    assert sent["layer_1.safetensors"] <= 100_001 < (8192 * 6 * 2 * 4)
    assert torch.equal(opened[1].W_dec, made[1].W_dec)
    assert hub.downloads()["layer_2.safetensors"] == sent["layer_2.safetensors"]


def test_one_commit_for_every_file(hub: HubServer, tmp_path: Path) -> None:
    old = native_files(tmp_path)
    repo = hub.add("me/set", old)
    first = repo.refs["main"]
    opened = open_set("me/set")
    repo.commit(dict.fromkeys(old, b"changed meanwhile"))
    assert torch.equal(opened[1].b_dec, make_set((1,), d_transcoder=4096)[1].b_dec)
    assert opened.provenance["revision"] == first
    assert opened.provenance["repository"] == "me/set"
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_set("me/set")
    for revision in (first, "v1"):
        repo.refs["v1"] = first
        assert open_set("me/set", revision=revision).provenance["revision"] == first
    assert all("nnsight-transcoders/" in r.headers["user-agent"] for r in hub.requests)


def test_a_set_in_a_folder_of_a_repository(hub: HubServer, tmp_path: Path) -> None:
    files = native_files(tmp_path)
    hub.add("me/sets", {f"small/v1/{name}": data for name, data in files.items()})
    opened = open_set("me/sets/small/v1")
    assert torch.equal(opened[0].b_dec, make_set((0,), d_transcoder=4096)[0].b_dec)
    assert opened.provenance["subfolder"] == "small/v1"
    with pytest.raises(CheckpointError, match="no folder 'large'; it has small/v1"):
        open_set("me/sets/large")
    with pytest.raises(CheckpointError, match="it has small/v1/README.md"):
        open_set("me/sets")


# -- without the Hub ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["local_files_only", "offline", "down", "unreachable"])
def test_the_cache_serves_when_the_hub_does_not(
    how: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_set((0, 1, 2))
    hub.add("me/set", folder_bytes(save_circuit_tracer(made, tmp_path / "local")))
    open_set("me/set", layers=[0])[0]
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "down":
        hub.down = True
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    asked = len(hub.requests)
    opened = open_set("me/set", local_files_only=how == "local_files_only")
    assert opened.layers == (0,)
    assert torch.equal(opened[0].W_dec, made[0].W_dec)
    assert opened.provenance["revision"] == hub.repos["me/set"].refs["main"]
    if how in ("local_files_only", "offline"):
        assert len(hub.requests) == asked


def test_a_layer_that_is_not_cached(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/set", native_files(tmp_path))
    open_set("me/set")[0]
    opened = open_set("me/set", local_files_only=True)
    assert opened.layers == (0, 1, 2)
    assert opened[0].config.d_transcoder == 4096
    with pytest.raises(CheckpointError, match="Next: load these layers once with a connection"):
        opened[1]
    with pytest.raises(CheckpointError, match="Next: load these layers once with a connection"):
        open_set("me/other", local_files_only=True)
    commit = "0" * 40
    with pytest.raises(CheckpointError, match=f"{commit} is not in the cache"):
        open_set("me/set", revision=commit, local_files_only=True)


def test_another_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/set", native_files(tmp_path))
    open_set("me/set", cache_dir=tmp_path / "other")[0]
    assert not Path(constants.HF_HUB_CACHE).exists()
    opened = open_set("me/set", cache_dir=tmp_path / "other", local_files_only=True)
    assert opened[0].config.layer == 0
    # The snapshot folder of a cache is a folder of links to blobs; it opens as a folder, too.
    (snapshot,) = (tmp_path / "other").glob("models--me--set/snapshots/*")
    assert (snapshot / "config.json").is_symlink()
    assert open_set(snapshot, layers=[0])[0].config.layer == 0


# -- refusals ----------------------------------------------------------------------------------


def test_refusals_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    files = native_files(tmp_path)
    hub.add("me/private", files, private=True)
    hub.add("me/gated", files, gated=True)
    hub.add("me/public", files)
    cases = [
        ("me/none", {}, "Repository Not Found.*Next: check the spelling.*hf auth login"),
        ("me/private", {}, "Repository Not Found.*hf auth login"),
        ("me/gated", {}, "Next: ask for access on the page of me/gated"),
        ("me/public", {"revision": "nope"}, "Next: pass revision= a branch"),
        ("a b c", {}, "Next: pass an existing folder or a Hub id"),
        ("me/public", {"token": True}, "Next: run `hf auth login`"),
    ]
    for name, options, message in cases:
        with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
            open_set(name, **options)
        assert caught.value.__cause__ is not None
    for name in ("me/private", "me/gated"):
        assert open_set(name, token=TOKEN)[0].config.layer == 0


def test_hub_that_is_down(hub: HubServer) -> None:
    hub.down = True
    with pytest.raises(CheckpointError, match="(?s)me/set: .*Next: "):
        open_set("me/set")


def test_damaged_file_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    files = folder_bytes(save_circuit_tracer(make_set(), tmp_path / "local"))
    hub.add("me/set", files | {"layer_1.safetensors": b"not tensors at all"})
    with pytest.raises(CheckpointError, match="Next: the file on the Hub is damaged"):
        open_set("me/set")
    assert open_set("me/set", layers=[0])[0].config.layer == 0


def test_names_that_lead_out(hub: HubServer, tmp_path: Path) -> None:
    files = native_files(tmp_path)
    hub.add("me/set", files | {"../outside.json": b"{}"})
    assert len(open_set("me/set")) == 3
    snapshot = LocalSnapshot(tmp_path / "local")
    (tmp_path / "secret.json").write_text("{}")
    for name in ("../secret.json", str(tmp_path / "secret.json"), "a/../../secret.json", ""):
        with pytest.raises(CheckpointError, match="outside of itself"):
            snapshot.path(name)


def test_links_that_lead_out(tmp_path: Path) -> None:
    folder = make_set().save_pretrained(tmp_path / "set")
    (folder / "layer_0.safetensors").rename(folder / "renamed.safetensors")
    (folder / "layer_0.safetensors").symlink_to("renamed.safetensors")
    (folder / "layer_1.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "layer_1.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    opened = open_set(folder)
    assert opened[0].config.layer == 0
    with pytest.raises(CheckpointError, match="is a link to .*elsewhere.safetensors, outside"):
        opened[1]


def test_places_that_are_no_checkpoint(tmp_path: Path) -> None:
    folder = make_set().save_pretrained(tmp_path / "set")
    with pytest.raises(CheckpointError, match="is a file; pass the folder"):
        open_set(folder / "config.json")
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            open_set(missing)
    with pytest.raises(CheckpointError, match="the name is empty"):
        open_set("")
    with pytest.raises(ConfigError, match="revision='main' is for Hub repositories"):
        open_set(folder, revision="main")


def test_read_only_folder_opens(tmp_path: Path) -> None:
    folder = make_set().save_pretrained(tmp_path / "set")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert open_set(folder)[2].config.layer == 2
    finally:
        folder.chmod(0o755)


# -- through the environment -------------------------------------------------------------------

_SCRIPT = """
import torch
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import Transcoder, TranscoderConfig

module = Transcoder(TranscoderConfig(d_in=4, d_out=4, d_transcoder=8))
torch.nn.init.normal_(module.W_dec)
TranscoderSet.from_transcoders({0: module}).push_to_hub("me/set")
opened = TranscoderSet.from_pretrained("me/set")
assert torch.equal(opened[0].W_dec, module.W_dec)
"""


def test_end_to_end_with_the_hubs_environment(tmp_path: Path) -> None:
    with HubServer().running() as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        subprocess.run(
            [sys.executable, "-c", _SCRIPT], env=os.environ | settings, check=True, timeout=120
        )
        assert "config.json" in hub.repos["me/set"].commits[hub.repos["me/set"].refs["main"]]

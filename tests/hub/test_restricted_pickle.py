"""Nothing in a pickle is run: each way of reaching for more than weights is refused by name."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.restricted_pickle import Record, load_restricted
from nnsight_transcoders.hub.torch_files import open_torch_file
from nnsight_transcoders.sets import TranscoderSet

from .test_dunefsky import FILE, opened, training_package, weights, write_layer


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def trap(marker: Path) -> Call:
    return Call(os.system, f"touch {marker}")


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": (trap(marker), f"{os.system.__module__}.system"),
        "nested": ({"state_dict": OrderedDict(a=[{"b": (trap(marker),)}])}, "system"),
        "in the config": ({"cfg": trap(marker), "state_dict": weights(0)}, "system"),
        "eval": (Call(eval, code), "__builtin__.eval"),
        "exec": (Call(exec, code), "__builtin__.exec"),
        "getattr": (Call(getattr, "a", "upper"), "getattr"),
        "import": (Call(__import__, "os"), "__import__"),
        "hub": (Call(torch.hub.load, "owner/name", "model"), "torch.hub.load"),
        "torch.load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "open": (Call(open, str(marker), "w"), "open"),
        "chain": (Call(map, Call(getattr, "a", "upper"), [1]), "refused"),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", sorted(attacks(Path("x"))))
def test_calls_are_refused_by_name(name: str, legacy: bool, tmp_path: Path) -> None:
    folder, marker = tmp_path / "set", tmp_path / "marker"
    folder.mkdir()
    content, seen = attacks(marker)[name]
    torch.save(content, folder / FILE.format(0), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=seen):
        opened(folder)
    assert not marker.exists()


def test_the_same_name_under_the_allowed_module() -> None:
    """Whatever is asked of the config's package is an inert record, even ``os``."""
    for name in (b"os", b"system", b"config.os.system", b"__class__"):
        code = b"csae_training.config\n" + name + b"\n(S'touch x'\ntR."
        with pytest.raises(CheckpointError, match="takes no arguments|cannot be read"):
            load_restricted(io.BytesIO(code), "f")
    with training_package() as config:
        data = pickle.dumps(config(), protocol=2)
    assert isinstance(load_restricted(io.BytesIO(data), "f"), Record)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"cposix\nsystem\n(S'true'\ntR.", "asks for posix.system"),
        # A chain over the memory: the function is put away first and called later.
        (b"cbuiltins\neval\np0\n0g0\n(S'1'\ntR.", "asks for builtins.eval"),
        (b"(S'true'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'true'\no.", "OBJ"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.", "asks for torch.hub.load"),
        (b"\x80\x04\x8c\x0ctorch._utils\x8c\x1b_rebuild_tensor_v2.__call__\x93.", "asks for"),
        (b"ctorch\nload\n.", "asks for torch.load"),
        (b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", "_load_from_bytes"),
        # The attributes of what is handed out cannot be changed.
        (b"ctorch._utils\n_rebuild_tensor_v2\n(dS'_call'\nctorch\ndevice\nsb.", "cannot be read"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00_callK\x01s\x86b.",
            "it se",
        ),
        (b"ctorch\nFloatStorage\n(dS'dtype'\nI1\nsb.", "cannot be read"),
        # Memory that the file does not have.
        (b"\x80\x02Nr\xff\xff\xff\xff.", "slot"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "no complete pickle"),
        (b"", "no complete pickle"),
        (b"N", "no complete pickle"),
        (b"R.", "no complete pickle|cannot be read"),
    ],
)
def test_opcodes(code: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_restricted(io.BytesIO(code), "f")


@pytest.mark.parametrize(
    "key", ["../data.pkl", "/etc/passwd", "0/../../x", "a", "", "0" * 40, "²", "-1"]
)
def test_storage_keys_that_lead_elsewhere(key: str) -> None:
    text = key.encode()
    code = (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX"
        + struct.pack("<I", len(text))
        + text
        + b"X\x03\x00\x00\x00cpuK\x04tQ."
    )
    with pytest.raises(CheckpointError, match="refers to a storage by the key"):
        load_restricted(io.BytesIO(code), "f")


def test_persistent_ids_that_are_no_storage() -> None:
    for code in (b"S'module'\nQ.", b"(S'module'\nS'os'\ntQ.", b"Pfile:///etc/passwd\n."):
        with pytest.raises(CheckpointError, match="no storage"):
            load_restricted(io.BytesIO(code), "f")


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Change the entries of a torch zip."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def test_storages_that_are_too_short_or_compressed(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "set", 0, weights(0))
    rewritten(path, lambda name, data: data[:-4] if name.endswith("data/2") else data)
    with pytest.raises(CheckpointError, match="no storage 2 of 480 bytes"):
        opened(tmp_path / "set")[0]
    path = write_layer(tmp_path / "set", 0, weights(0))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed"):
        opened(tmp_path / "set")
    write_layer(tmp_path / "set", 0, weights(0))
    rewritten(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="big-endian"):
        opened(tmp_path / "set")


def test_views_are_bounded(tmp_path: Path) -> None:
    """A tensor that shows its storage many times over, or reads beyond it, is refused."""
    for view in (
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.zeros(4, 4)[:, :1].expand(4, 9),
    ):
        torch.save({"cfg": {}, "state_dict": {"W_enc": view}}, tmp_path / "f.pt")
        with (tmp_path / "f.pt").open("rb") as file, open_torch_file(file, "f") as (content, read):
            with pytest.raises(CheckpointError, match="does not fit its storage"):
                read(content["state_dict"]["W_enc"])
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": whole[1:, ::2].T, "empty": whole[:0]}, tmp_path / "f.pt")
    with (tmp_path / "f.pt").open("rb") as file, open_torch_file(file, "f") as (content, read):
        assert torch.equal(read(content["t"]), whole[1:, ::2].T)
        assert read(content["empty"]).shape == (0, 4)


def test_hidden_methods_do_not_shadow_the_mapping() -> None:
    """An ``OrderedDict`` may carry attributes; ours ignores them."""
    code = b"ccollections\nOrderedDict\n(tR(dS'items'\nctorch\ndevice\nsS'get'\nI1\nsb."
    found = load_restricted(io.BytesIO(code), "f")
    assert found.get("x") is None
    assert list(found.items()) == []


def nested(make: bytes, levels: int) -> bytes:
    """A tuple or list that holds the one before it twice, and so on: 2 ** levels when walked."""
    code = b"N" + make + b"q\x00"
    for level in range(levels):
        code += b"(h" + bytes([level]) + b"h" + bytes([level]) + make + b"q" + bytes([level + 1])
    return code


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02}" + nested(b"\x85", 0) + b"N" + nested(b"t", 60) + b"Ns.",
        b"\x80\x02}ctorch\ndevice\n" + b"(" + nested(b"l", 60) + b"tRNs.",
        b"\x80\x02(Nt" + b"2\x86" * 60 + b".",
        b"\x80\x02}(Nt" + b"q\x000q\x01Ns.",
    ],
)
def test_what_is_short_in_the_file_and_endless_when_walked(code: bytes) -> None:
    with pytest.raises(CheckpointError):
        load_restricted(io.BytesIO(code), "f")


def test_endless_lists_are_not_printed(tmp_path: Path) -> None:
    """As config values, names of tensors, versions: they are never turned into text."""
    endless: list[Any] = []
    for _ in range(60):
        endless = [endless, endless]
    for content in (
        {"cfg": {"a": endless}, "state_dict": weights(0)},
        {"cfg": endless, "state_dict": endless},
        endless,
    ):
        (tmp_path / "set").mkdir(exist_ok=True)
        torch.save(content, tmp_path / "set" / FILE.format(0))
        if isinstance(content, dict) and content["cfg"] is not endless:
            assert opened(tmp_path / "set").provenance["config"]["0"] == {"a": "<list>"}
        else:
            with pytest.raises(CheckpointError, match="holds no state_dict"):
                opened(tmp_path / "set")
    data = pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(endless) + pickle.dumps({})
    (tmp_path / "set" / FILE.format(0)).write_bytes(data)
    with pytest.raises(CheckpointError, match="another version"):
        opened(tmp_path / "set")


def test_a_symlink_out_of_the_folder(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "other", 0, weights(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        TranscoderSet.from_pretrained(tmp_path / "set", cache_dir=tmp_path / "cache")


def test_find_class_is_the_only_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported while a pickle is read."""
    real = builtins.__import__
    seen: list[str] = []

    def watch(name: str, *rest: Any, **more: Any) -> Any:
        seen.append(name)
        return real(name, *rest, **more)

    with training_package() as config:
        data = pickle.dumps({"cfg": config()}, protocol=2)
    monkeypatch.setattr(builtins, "__import__", watch)
    load_restricted(io.BytesIO(data), "f")
    assert not [name for name in seen if name.startswith("sae_training")]

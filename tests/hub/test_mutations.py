"""A damaged checkpoint is a clear error or loads as what it says: never another exception.

The same mutations are tried on every run. ``MUTATIONS=1000 pytest tests/hub/test_mutations.py``
tries so many of each format, other ones each time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nnsight_transcoders.errors import TranscoderError
from nnsight_transcoders.hub.registry import known_formats
from nnsight_transcoders.sets import TranscoderSet

from .builders import BUILDERS

EXAMPLES = int(os.environ.get("MUTATIONS", "30"))

#: What a value of a config may be replaced by.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 40),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["../x", "/etc/passwd", "blocks.0.hook_resid_pre", "topk", "float16"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])


def load_everything(folder: Path, options: dict[str, Any]) -> None:
    """Open, load and use every layer; what loads has to be what its config says."""
    cache = folder.parent / "cache"
    transcoders = TranscoderSet.from_pretrained(folder, cache_dir=cache, **options)
    repr(transcoders)
    for layer in transcoders.layers:
        config = transcoders.config(layer)
        first = torch.tensor([0, config.d_transcoder - 1])
        encoder, decoder = transcoders.rows(layer, first, "encoder"), transcoders.rows(layer, first)
        module = transcoders[layer]
        assert module.W_enc.shape == (config.d_transcoder, config.d_in)
        assert module.b_dec.shape == (config.d_out,)
        assert all(torch.isfinite(weight).all() for weight in module.parameters())
        assert torch.equal(encoder, module.W_enc[first])
        assert torch.equal(decoder, module.W_dec[first])
        hidden = module.encode(torch.ones(1, config.d_in, dtype=module.W_enc.dtype))
        assert hidden.shape == (1, config.d_transcoder)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def mutate_bytes(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        return
    kind = data.draw(st.sampled_from(["truncate", "flip", "flip early", "insert", "zero"]))
    # Most of a file is weights; what can go wrong in other ways is at its ends.
    limit = len(content) - 1
    at = data.draw(st.integers(0, min(limit, 400) if kind == "flip early" else limit))
    if kind == "truncate":
        del content[at:]
    elif kind.startswith("flip"):
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        content[at : at + data.draw(st.integers(1, 64))] = b""
    path.write_bytes(content)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a nested value where another value could be put."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def mutate_config(path: Path, data: st.DataObject) -> None:
    is_json = path.suffix == ".json"
    raw = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    found = list(places(raw))
    if not found:
        return
    holder, key = data.draw(st.sampled_from(found))
    kind = data.draw(st.sampled_from(["change", "drop", "rename"]))
    if kind == "change":
        holder[key] = data.draw(VALUES)
    else:
        value = holder.pop(key)
        if kind == "rename" and isinstance(holder, dict):
            holder[data.draw(st.text(max_size=5))] = value
    path.write_text(json.dumps(raw) if is_json else yaml.safe_dump(raw))


def mutate_tensors(path: Path, data: st.DataObject) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = data.draw(
        st.sampled_from(["transpose", "cut", "flatten", "retype", "drop", "rename", "add", "empty"])
    )
    if kind == "transpose" and tensor.ndim >= 2:
        tensors[name] = tensor.transpose(0, -1).contiguous()
    elif kind == "cut" and tensor.ndim:
        dim = data.draw(st.integers(0, tensor.ndim - 1))
        tensors[name] = tensor.narrow(dim, 0, data.draw(st.integers(0, tensor.shape[dim]))).clone()
    elif kind == "flatten":
        tensors[name] = tensor.flatten()
    elif kind == "retype":
        tensors[name] = tensor.to(data.draw(DTYPES))
    elif kind in ("drop", "rename"):
        del tensors[name]
        if kind == "rename":
            tensors[data.draw(st.text(max_size=5))] = tensor
    elif kind == "add":
        tensors["more"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(0)
    save_file(tensors, path)


def mutate_names(path: Path, folder: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["remove", "rename", "move", "copy", "link"]))
    if kind == "remove":
        path.unlink()
    elif kind == "rename":
        digit = data.draw(st.integers(0, 99))
        path.rename(path.with_name(path.name.replace("3", str(digit)).replace("0", str(digit))))
    elif kind == "move":
        path.rename(folder / path.name)
    elif kind == "copy":
        (folder / "other").mkdir(exist_ok=True)
        shutil.copy(path, folder / "other" / path.name)
    else:
        outside = folder.parent / "outside"
        path.rename(outside)
        path.symlink_to(outside)


def mutate(folder: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_of(folder)))
    kinds = ["bytes", "names"]
    kinds += ["config"] * 2 if path.suffix in (".json", ".yaml") else []
    kinds += ["tensors"] * 2 if path.suffix == ".safetensors" else []
    kind = data.draw(st.sampled_from(kinds))
    if kind == "bytes":
        mutate_bytes(path, data)
    elif kind == "names":
        mutate_names(path, folder, data)
    elif kind == "config":
        mutate_config(path, data)
    else:
        mutate_tensors(path, data)


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def example(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A valid checkpoint, which is copied for each mutation."""
    folder = tmp_path_factory.mktemp("valid") / "set"
    return folder, BUILDERS[request.param](folder)


def test_the_examples_are_valid(example: tuple[Path, dict[str, Any]]) -> None:
    load_everything(*example)


def test_the_examples_convert(example: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Every format can be saved as this package's own, with all that changes what it computes."""
    folder, options = example
    was = TranscoderSet.from_pretrained(folder, cache_dir=tmp_path / "cache", **options)
    now = TranscoderSet.from_pretrained(was.save_pretrained(tmp_path / "native"))
    assert now.layers == was.layers
    for layer in was.layers:
        assert now.config(layer) == was[layer].config
        for name, weight in was[layer].state_dict().items():
            assert torch.equal(now[layer].state_dict()[name], weight)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="MUTATIONS" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_mutations(
    example: tuple[Path, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    valid, options = example
    place = tmp_path_factory.mktemp("mutated")
    try:
        folder = place / "set"
        shutil.copytree(valid, folder)
        mutate(folder, data)
        try:
            load_everything(folder, options)
        except TranscoderError as error:
            assert str(error)
    finally:
        shutil.rmtree(place)


def test_every_format_has_an_example() -> None:
    """A format that comes without a builder is not tested here: add one to ``builders.py``."""
    assert {name.split(":")[0] for name in BUILDERS} >= set(known_formats()) - {"lorsa"}

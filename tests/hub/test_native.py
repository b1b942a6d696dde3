"""The package's own layout: round trips, the layout itself, laziness, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import Transcoder

from .checkpoints import damage_weights, make_set, random, write_tensors

KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "skip": {"skip": True, "d_out": 5},
    "jumprelu": {"activation": "jumprelu"},
    "batchtopk": {"activation": "batchtopk"},
    "topk": {"activation": "topk", "k": 3, "relu_first": False},
    "grouptopk": {"activation": "grouptopk", "k": 2, "n_groups": 4},
    "clt": {"cross_layer": True, "activation": "jumprelu"},
    "clt-skip": {"cross_layer": True, "skip": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind: str, dtype: str, tmp_path: Path) -> None:
    made = make_set((1, 2, 4), dtype=dtype, input_site="N0", extra={"seen": [1]}, **KINDS[kind])
    loaded = TranscoderSet.from_pretrained(made.save_pretrained(tmp_path / "set"))
    assert loaded.layers == made.layers
    assert loaded.cross_layer == made.cross_layer
    for layer in made.layers:
        assert loaded.config(layer) == made[layer].config
        assert loaded[layer].config == made[layer].config
        assert loaded.targets(layer) == made.targets(layer)
        before, after = made[layer].state_dict(), loaded[layer].state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor), name
    x = {layer: random(layer, 3, 6) for layer in made.layers}
    features = {layer: made[layer].encode(x[layer]) for layer in made.layers}
    for layer in made.layers:
        expected = made.decode(layer, features, x[layer])
        assert torch.equal(loaded.decode(layer, features, x[layer]), expected)


@pytest.mark.parametrize("kind", ["relu", "clt"])
def test_rows_are_the_tensors_rows(kind: str, tmp_path: Path) -> None:
    made = make_set(**KINDS[kind])
    made.save_pretrained(tmp_path)
    indices = torch.tensor([23, 4, 5, 5, 0, 6])
    for layer in made.layers:
        opened = TranscoderSet.from_pretrained(tmp_path)
        assert torch.equal(opened.rows(layer, indices, "encoder"), made[layer].W_enc[indices])
        assert torch.equal(opened.rows(layer, indices, "decoder"), made[layer].W_dec[indices])
        assert opened.rows(layer, [], "decoder").shape == made[layer].W_dec[:0].shape
        assert not opened._kept


def write_layout(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint of one layer written by hand, as the layout is documented."""
    tensors = {
        "W_enc": random(1, 7, 4),
        "b_enc": random(2, 7),
        "W_dec": random(3, 7, 3),
        "b_dec": random(4, 3),
        "W_skip": random(5, 3, 4),
        "threshold": random(6, 7).abs(),
    }
    write_tensors(folder / "layer_3.safetensors", tensors)
    layer = {
        "d_in": 4,
        "d_out": 3,
        "d_transcoder": 7,
        "layer": 3,
        "activation": "jumprelu",
        "skip": True,
        "input_site": "R",
        "output_site": "O'",
        "leading_positions": 1,
        "base_model": "owner/model",
    }
    config = {
        "format": "nnsight-transcoders",
        "format_version": 1,
        "kind": "per-layer",
        "layers": {"3": layer | changes.pop("layer", {})},
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return tensors


def test_layout_written_by_hand(tmp_path: Path) -> None:
    w = write_layout(tmp_path)
    opened = TranscoderSet.from_pretrained(tmp_path)
    x = random(9, 5, 4)
    z = x @ w["W_enc"].T + w["b_enc"]
    expected = (z * (z > w["threshold"])) @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T
    torch.testing.assert_close(opened[3](x), expected)
    config = opened.config(3)
    assert (config.input_site, config.output_site, config.leading_positions) == ("R", "O'", 1)
    assert opened.provenance["files"] == ["layer_3.safetensors"]
    assert opened.provenance["config"]["kind"] == "per-layer"


def test_saved_files_are_as_documented(tmp_path: Path) -> None:
    made = make_set((0, 1), cross_layer=True, activation="jumprelu", skip=True)
    made.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "layer_0.safetensors", "layer_1.safetensors"}
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "cross-layer"
    assert config["targets"] == {"0": [0, 1], "1": [1]}
    with safe_open(tmp_path / "layer_0.safetensors", "pt") as handle:
        names = list(handle.keys())
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
        assert handle.metadata()["format_version"] == "1"
    assert shapes == {
        "W_enc": (24, 6),
        "b_enc": (24,),
        "W_dec": (24, 2, 6),
        "b_dec": (6,),
        "W_skip": (6, 6),
        "threshold": (24,),
    }


def test_opening_reads_no_weight(tmp_path: Path) -> None:
    make_set().save_pretrained(tmp_path)
    damage_weights(tmp_path / "layer_1.safetensors")
    (tmp_path / "layer_2.safetensors").write_bytes(b"cut off")
    opened = TranscoderSet.from_pretrained(tmp_path)
    assert opened.layers == (0, 1, 2)
    assert opened.config(2).d_transcoder == 24
    assert isinstance(opened[0], Transcoder)
    with pytest.raises(CheckpointError, match="layer 1's weight .* NaN"):
        opened[1]
    with pytest.raises(CheckpointError, match="layer_2.safetensors cannot be read: .*complete"):
        opened[2]


def test_loaded_weights_can_be_trained_without_touching_the_file(tmp_path: Path) -> None:
    make_set((0,)).save_pretrained(tmp_path)
    before = (tmp_path / "layer_0.safetensors").read_bytes()
    module = TranscoderSet.from_pretrained(tmp_path)[0]
    assert isinstance(module, Transcoder)
    module(random(1, 3, 6)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not torch.equal(module.b_dec, make_set((0,))[0].b_dec)
    assert (tmp_path / "layer_0.safetensors").read_bytes() == before


def test_layers(tmp_path: Path) -> None:
    make_set().save_pretrained(tmp_path)
    (tmp_path / "layer_1.safetensors").unlink()
    assert TranscoderSet.from_pretrained(tmp_path, layers=[2, 0]).layers == (0, 2)
    with pytest.raises(CheckpointError, match="no file layer_1.safetensors; it has README.md"):
        TranscoderSet.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has layers \[0, 1, 2\], not \[7\]"):
        TranscoderSet.from_pretrained(tmp_path, layers=[0, 7])
    with pytest.raises(InputError, match="name at least one"):
        TranscoderSet.from_pretrained(tmp_path, layers=[])
    make_set(cross_layer=True).save_pretrained(tmp_path / "clt")
    with pytest.raises(InputError, match="cannot be cut"):
        TranscoderSet.from_pretrained(tmp_path / "clt", layers=[0])


def test_truncated_file(tmp_path: Path) -> None:
    make_set().save_pretrained(tmp_path)
    path = tmp_path / "layer_0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    opened = TranscoderSet.from_pretrained(tmp_path)
    for read in (lambda: opened.load(0), lambda: opened.rows(0, [1])):
        with pytest.raises(CheckpointError, match="cut off or damaged.*again"):
            read()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        opened.load(0)


def test_tensors_that_do_not_fit_the_config(tmp_path: Path) -> None:
    good = write_layout(tmp_path)
    opened = TranscoderSet.from_pretrained(tmp_path)
    cases = [
        ({"W_dec": good["W_dec"].T}, r"layer_3.*W_dec has shape \(3, 7\), expected \(7, 3\)"),
        ({"b_enc": good["b_enc"].long()}, "b_enc has dtype I64, expected one of"),
        ({"W_extra": random(8, 7)}, "has tensor.s. W_extra that the config does not account"),
        ({"threshold": None}, "has no tensor threshold; it has W_dec, W_enc"),
    ]
    for change, message in cases:
        tensors = {k: v for k, v in {**good, **change}.items() if v is not None}
        write_tensors(tmp_path / "layer_3.safetensors", tensors)
        with pytest.raises(CheckpointError, match=message):
            opened.load(3)
    write_tensors(tmp_path / "layer_3.safetensors", {**good, "W_dec": good["W_dec"].T})
    with pytest.raises(CheckpointError, match="W_dec has shape"):
        opened.rows(3, [0], "decoder")
    write_tensors(tmp_path / "layer_3.safetensors", {"W_enc": good["W_enc"]})
    with pytest.raises(CheckpointError, match="no tensor W_dec"):
        opened.rows(3, [0], "decoder")


def test_the_header_decides_the_dtype(tmp_path: Path) -> None:
    good = write_layout(tmp_path, layer={"dtype": "bfloat16"})
    module = TranscoderSet.from_pretrained(tmp_path).load(3)
    assert module.W_enc.dtype == torch.float32
    assert module.config.dtype == "float32"
    half = {name: tensor.half() for name, tensor in good.items()}
    write_tensors(tmp_path / "layer_3.safetensors", {**half, "threshold": good["threshold"]})
    module = TranscoderSet.from_pretrained(tmp_path).load(3)
    assert module(random(1, 2, 4)).dtype == torch.float32
    assert module.config.dtype == "float16"
    assert torch.equal(module.activation.threshold, good["threshold"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2.*Install a newer"),
        ({"kind": "both"}, "kind 'both'; known: per-layer, cross-layer"),
        ({"colour": 1}, "unknown key.s. colour; known: format"),
        ({"layers": {}}, "must map layer numbers"),
        ({"layers": {"x": {}}}, "must map layer numbers"),
        ({"layers": {"3": None}}, "layer 3 has no config"),
        ({"layer": {"colour": 1}}, "layer 3: unknown transcoder config key.s. colour"),
        ({"layer": {"d_in": -4}}, "layer 3: d_in must be a positive integer"),
        ({"layer": {"layer": 2}}, "layer 3 has the config of layer 2"),
        ({"layer": {"cross_layer": True}}, "does not fit kind 'per-layer'"),
        (
            {"kind": "cross-layer", "targets": {"3": [4]}, "layer": {"cross_layer": True}},
            r"writes to layers \[4\], expected \[3\]",
        ),
    ],
)
def test_config_that_is_wrong(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_layout(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        TranscoderSet.from_pretrained(tmp_path)


def test_config_that_is_no_config(tmp_path: Path) -> None:
    write_layout(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "nnsight-transcoders", "format_version": 1}')
    with pytest.raises(CheckpointError, match="lacks kind, layers"):
        TranscoderSet.from_pretrained(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[1]", "should hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            TranscoderSet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read config.json"):
        TranscoderSet.from_pretrained(tmp_path)

"""Which format a checkpoint is, and what happens when that is not clear."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from nnsight_transcoders.builtin import BUILTIN_SETS
from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.hub import registry
from nnsight_transcoders.hub.circuit_tracer import save_circuit_tracer
from nnsight_transcoders.hub.formats import Evidence, Strength
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import make_set, write_tensors


def test_names_are_unique() -> None:
    formats = registry.known_formats()
    assert {"nnsight-transcoders", "circuit-tracer", "peek"} <= set(formats)
    assert all(name == format.name and format.summary for name, format in formats.items())
    with pytest.raises(ConfigError, match="'peek' already"):
        registry.register(formats["peek"])


def test_unknown_format_and_option(tmp_path: Path) -> None:
    make_set().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="unknown checkpoint format 'pek'; known: circuit-tracer"):
        TranscoderSet.from_pretrained(tmp_path, format="pek")
    with pytest.raises(ConfigError, match="has no option k; its options: none"):
        TranscoderSet.from_pretrained(tmp_path, k=3)


def test_the_stronger_evidence_decides(tmp_path: Path) -> None:
    save_circuit_tracer(make_set(), tmp_path)
    assert TranscoderSet.from_pretrained(tmp_path).provenance["format"] == "circuit-tracer"
    # A config.json of something else, as many repositories have, says nothing.
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    assert TranscoderSet.from_pretrained(tmp_path).provenance["format"] == "circuit-tracer"
    (tmp_path / "config.json").unlink()
    make_set().save_pretrained(tmp_path)
    assert TranscoderSet.from_pretrained(tmp_path).provenance["format"] == "nnsight-transcoders"
    opened = TranscoderSet.from_pretrained(tmp_path, format="circuit-tracer")
    assert opened.provenance["format"] == "circuit-tracer"


def test_a_format_that_is_not_there(tmp_path: Path) -> None:
    make_set().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not name the input hook"):
        TranscoderSet.from_pretrained(tmp_path, format="circuit-tracer")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is it another format"):
        TranscoderSet.from_pretrained(tmp_path, format="nnsight-transcoders")


def test_nothing_recognised(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="it has notes.txt.*circuit-tracer.*format="):
        TranscoderSet.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"learning_rate": 0.1}))
    with pytest.raises(CheckpointError, match="no transcoder format is recognised"):
        TranscoderSet.from_pretrained(tmp_path)
    for number in range(20):
        (tmp_path / f"n{number:02}").write_text("")
    with pytest.raises(CheckpointError, match="n10 and 10 more"):
        TranscoderSet.from_pretrained(tmp_path)


def test_ambiguity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FORMATS", dict(registry.known_formats()))
    other = replace(
        registry.known_formats()["circuit-tracer"],
        name="other",
        detect=lambda snapshot: Evidence(Strength.FILE_NAMES, snapshot.files[0]),
    )
    registry.register(other)
    write_tensors(tmp_path / "layer_0.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        TranscoderSet.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "circuit-tracer: layer_0.safetensors; other: layer_0.safetensors" in message
    assert "format='circuit-tracer' or format='other'" in message


def test_builtin_names() -> None:
    with pytest.raises(InputError, match="no builtin transcoder set 'builtin/none'"):
        TranscoderSet.from_pretrained("builtin/none")


@pytest.mark.parametrize("name", sorted(BUILTIN_SETS))
def test_builtin_sets(name: str) -> None:
    if not BUILTIN_SETS[name].is_dir():
        with pytest.raises(CheckpointError, match="missing from this installation"):
            TranscoderSet.from_pretrained(name)
        return
    opened = TranscoderSet.from_pretrained(name)
    assert opened.provenance["repository"] == name
    assert "folder" not in opened.provenance
    assert opened.cross_layer == (name == "builtin/clt")
    assert opened[opened.layers[0]].W_enc.shape[0] == opened.config(opened.layers[0]).d_transcoder

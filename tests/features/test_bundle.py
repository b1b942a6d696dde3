"""Bundles as files: read feature by feature, damaged, shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nnsight_transcoders import FeatureBundle
from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.features import lazy_tables


@pytest.fixture
def folder(collected: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(collected, tmp_path / "copy"))


def test_what_is_in_it(bundle: FeatureBundle) -> None:
    assert bundle.layers == (1, 2)
    assert bundle.n_features(1) == bundle.n_features(2) == 768
    assert len(bundle) == len(list(bundle)) == 1536
    assert (1, 0) in bundle
    assert (2, 767) in bundle
    assert (0, 0) not in bundle
    assert (1, 768) not in bundle
    assert bundle.metadata["model"] == "builtin"
    assert bundle.metadata["transcoders"]["format"] == "nnsight-transcoders"
    assert "1536 features of 2 layers" in repr(bundle)


def test_a_feature_that_is_never_active(bundle: FeatureBundle) -> None:
    dead = int((bundle.density(1) == 0).nonzero()[0])
    report = bundle[1, dead]
    assert (report.n_active, report.max_activation, report.mean_activation) == (0, 0.0, 0.0)
    assert report.groups == report.examples == ()
    assert report.top_logits
    assert "active at 0 positions" in str(report)


def test_reports_are_json_and_text(bundle: FeatureBundle) -> None:
    report = bundle[2, int(bundle.density(2).argmax())]
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["n_active"] == report.n_active
    assert [g["name"] for g in data["groups"]][0] == "Top"
    assert data["groups"][0]["examples"][0]["tokens"] == list(report.examples[0].tokens)
    assert f"Feature {report.index} of layer 2" in str(report)
    assert "<<" in str(report.examples[0])


def test_bands_go_down_and_are_named_by_their_range(bundle: FeatureBundle) -> None:
    report = bundle[2, int(bundle.density(2).argmax())]
    bands = report.groups[1:]
    assert len(bands) > 1
    assert [band.high for band in bands] == sorted((b.high for b in bands), reverse=True)
    assert bands[0].name == f"{bands[0].low:.3g} to {bands[0].high:.3g}"
    assert bands[0].high == report.max_activation


def test_one_feature_reads_only_its_rows(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the elements that are read: a few thousand of millions."""
    read: list[int] = []

    class Counting(lazy_tables.LazyTables):
        def row(self, name: str, row: int | None = None) -> torch.Tensor:
            found = super().row(name, row)
            read.append(found.numel())
            return found

        def rows(self, name: str, start: int, end: int) -> torch.Tensor:
            found = super().rows(name, start, end)
            read.append(found.numel())
            return found

    monkeypatch.setattr("nnsight_transcoders.features.bundle.LazyTables", Counting)
    bundle = FeatureBundle.open(collected)
    assert sum(read) == 0
    assert bundle[1, 700].n_active >= 0
    with safe_open(collected / "features.safetensors", "pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert sum(read) < total / 100


@pytest.mark.parametrize(
    ("key", "message"), [((0, 3), "layers 1, 2, not 0"), ((1, 768), "0 to 767"), ((1, -1), "0 to")]
)
def test_features_that_are_not_there(
    bundle: FeatureBundle, key: tuple[int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bundle[key]


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no feature bundle"):
        FeatureBundle.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="interrupted"):
        FeatureBundle.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "does not describe"),
        ('{"format": "nnsight-transcoders features", "version": 9}', "version 9"),
        ('{"format": "nnsight-transcoders features", "version": 1}', "lacks layers"),
        ("\x00\xff", "cannot be read"),
    ],
)
def test_a_damaged_index_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        FeatureBundle.open(folder)


@pytest.mark.parametrize(
    "change", [{"layers": {"a": 3}}, {"layers": [1]}, {"statistics": {"n_bands": 3}}]
)
def test_an_index_that_makes_no_sense_is_named(folder: Path, change: dict[str, object]) -> None:
    index = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(CheckpointError, match="is damaged"):
        FeatureBundle.open(folder)


def test_damaged_tables_are_named(folder: Path) -> None:
    tables = folder / "features.safetensors"
    good = tables.read_bytes()
    for bad in (b"", good[:50], good[: len(good) // 2], b"\xff" * 64):
        tables.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"features\.safetensors is damaged"):
            FeatureBundle.open(folder)
    tables.unlink()
    with pytest.raises(CheckpointError, match=r"features\.safetensors"):
        FeatureBundle.open(folder)


def test_files_that_do_not_belong_together(folder: Path) -> None:
    index = json.loads((folder / "bundle.json").read_text())
    index["layers"]["2"] = 10
    (folder / "bundle.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="do not belong together"):
        FeatureBundle.open(folder)


def test_a_place_outside_the_corpus_is_damage(folder: Path) -> None:
    bundle = FeatureBundle.open(folder)
    with pytest.raises(CheckpointError, match="damaged"):
        bundle._tables.context(10**9)


def test_labels_are_kept_beside_it(folder: Path) -> None:
    bundle = FeatureBundle.open(folder)
    bundle.labels[2, 5] = "years <b>"
    assert bundle[2, 5].label is not None
    bundle.labels.save()
    again = FeatureBundle.open(folder)
    assert again[2, 5].label == bundle[2, 5].label
    assert again[2, 6].label is None
    assert str(again[2, 5]).startswith("Feature 5 of layer 2: years <b>")

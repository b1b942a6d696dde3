"""Labels from files, by hand, and written again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nnsight_transcoders import FeatureLabels
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.features.report import Label

HOSTILE = '</script><script>alert(1)</script> "a, b"\n\u202eline two'
NEURONPEDIA = [
    {
        "modelId": "gpt2-small",
        "layer": "6-transcoder-hp",
        "index": "650",
        "description": " dates ",
        "explanationModelName": "gpt-4o-mini",
    },
    {"layer": 7, "index": 3, "explanations": [{"description": "names"}, {"description": "no"}]},
    {"layer": "8", "index": "1", "explanations": []},
]


def test_neuronpedia_records(tmp_path: Path) -> None:
    path = tmp_path / "explanations.json"
    path.write_text(json.dumps(NEURONPEDIA))
    labels = FeatureLabels.read(path)
    assert dict(labels) == {(6, 650): Label("dates", "gpt-4o-mini"), (7, 3): Label("names")}


def test_gzipped_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "batch-0.jsonl.gz"
    lines = "\n".join(json.dumps(record) for record in NEURONPEDIA) + "\n\n"
    path.write_bytes(gzip.compress(lines.encode()))
    assert list(FeatureLabels.read(path)) == [(6, 650), (7, 3)]


def test_a_plain_object_and_a_single_record(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"8_355": "years", "0_2": "the"}))
    assert {key: label.text for key, label in FeatureLabels.read(path).items()} == {
        (8, 355): "years",
        (0, 2): "the",
    }
    path.write_text(json.dumps(NEURONPEDIA[0]))
    assert len(FeatureLabels.read(path)) == 1


def test_csv_with_other_peoples_column_names(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\ufefffeature,layer,label,note\n355,8,years,x\n2,0,,not yet\n", "utf-8")
    assert dict(FeatureLabels.read(path)) == {(8, 355): Label("years")}


@pytest.mark.parametrize("name", ["labels.json", "labels.jsonl", "labels.csv"])
def test_what_is_written_comes_back(tmp_path: Path, name: str) -> None:
    labels = FeatureLabels({(3, 7): Label(HOSTILE, "somebody", {"detection": 0.75}), (0, 1): "a"})
    path = labels.save(tmp_path / name)
    assert dict(FeatureLabels.read(path)) == dict(labels)
    again = FeatureLabels.read(path)
    del again[0, 1]
    again[3, 7] = "mine"
    again.save()
    assert dict(FeatureLabels.read(path)) == {(3, 7): Label("mine")}


def test_a_file_edited_by_hand_with_what_neuronpedia_adds(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(
        json.dumps([{"layer": "1", "index": "2", "description": "x", "scores": [{"value": 1}]}])
    )
    assert FeatureLabels.read(path)[1, 2] == Label("x")


def test_details_for_the_graph_page() -> None:
    labels = FeatureLabels({(3, 7): "years"})
    others = {"3_7": {"top_logits": [["a", 1.0]]}, "4_1": {"label": "kept"}}
    merged = labels.details(others)
    assert merged == {
        "3_7": {"top_logits": [["a", 1.0]], "label": "years"},
        "4_1": {"label": "kept"},
    }
    assert "label" not in others["3_7"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[3]", "record 1: a label is a record"),
        ("a.json", '[{"layer": 1, "index": 2}]', "record 1: no description"),
        ("a.json", '[{"layer": "x", "index": 2, "label": "y"}]', "layer is 'x'"),
        ("a.json", '[{"layer": 1, "index": "2.5", "label": "y"}]', "index is '2.5'"),
        ("a.json", '{"8-355": "years"}', "key '8-355'"),
        ("a.jsonl", '{"layer": 1, "index": 2, "label": "y"}\nno', "is not JSON"),
        ("a.csv", "layer,label\n1,x\n", "row 1: index is None"),
        ("a.txt", "", "read from .json"),
        ("a.json.gz", "no gzip", "cannot read labels"),
    ],
)
def test_files_that_are_no_labels(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        FeatureLabels.read(tmp_path / name)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        FeatureLabels.read(tmp_path / "nothing.json")
    assert not FeatureLabels.read(tmp_path / "nothing.json", missing_ok=True)
    with pytest.raises(InputError, match="no file"):
        FeatureLabels().save()
    with pytest.raises(InputError, match="is empty"):
        FeatureLabels({(1, 2): "  "})
    with pytest.raises(InputError, match="key is"):
        FeatureLabels({(-1, 2): "a"})

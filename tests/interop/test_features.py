"""Feature files for circuit-tracer's page, read the way its script reads them."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import nnsight
import pytest

from nnsight_transcoders import (
    FeatureBundle,
    TranscoderSet,
    attribute,
    builtin_model_path,
    collect_features,
    write_feature_files,
    write_packed_features,
)
from nnsight_transcoders.builtin.text import examples
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.features.report import Histogram
from nnsight_transcoders.interop.feature_json import _quantiles, feature_json
from nnsight_transcoders.interop.names import cantor


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> FeatureBundle:
    path = builtin_model_path()
    model = nnsight.TransformersModel(path, task="text-generation", dispatch=True)
    texts = [example.prompt for example in examples("two-hop", "train", 24, 0)]
    chosen = TranscoderSet.from_pretrained("builtin/per-layer")
    folder = tmp_path_factory.mktemp("features") / "bundle"
    return collect_features(model, chosen, texts, folder, layers=[0, 2], context=32)


def most_active(bundle: FeatureBundle, layer: int) -> int:
    counts = [bundle[layer, i].n_active for i in range(0, bundle.n_features(layer), 16)]
    return 16 * counts.index(max(counts))


def test_a_record(bundle: FeatureBundle) -> None:
    index = most_active(bundle, 2)
    report = bundle[2, index]
    record = feature_json(report, "layer_2")
    assert (record["index"], record["transcoder_id"]) == (index, "layer_2")
    assert record["act_max"] == report.max_activation > 0
    assert record["activation_frequency"] == report.density > 0
    assert [q["quantile_name"] for q in record["examples_quantiles"]][0] == "Top"
    for group in record["examples_quantiles"]:
        for example in group["examples"]:
            assert len(example["tokens"]) == len(example["tokens_acts_list"])
            peak = example["tokens_acts_list"][example["train_token_ind"]]
            assert peak == max(example["tokens_acts_list"])
            assert example["is_repeated_datapoint"] is False
    assert record["top_logits"] == [token for token, _ in report.top_logits]
    assert sum(record["histogram"]) == report.n_active
    json.dumps(record, allow_nan=False)


def test_quantiles_by_hand() -> None:
    found = _quantiles(Histogram(counts=(50, 0, 40, 10), width=0.5))
    assert len(found) == 100
    assert found[:50] == [0.5] * 50
    assert found[50:90] == [1.5] * 40
    assert found[90:] == [2.0] * 10
    assert _quantiles(Histogram(counts=(0, 0), width=1.0)) == []


def test_loose_files(bundle: FeatureBundle, tmp_path: Path) -> None:
    files = write_feature_files(bundle, tmp_path, [(2, 7), (0, 3), (2, 7)])
    assert sorted(f.name for f in files) == sorted([f"{cantor(0, 3)}.json", f"{cantor(2, 7)}.json"])
    found = json.loads((tmp_path / f"{cantor(2, 7)}.json").read_text())
    assert found == json.loads(json.dumps(feature_json(bundle[2, 7], "layer_2")))


def test_a_graphs_features(bundle: FeatureBundle, tmp_path: Path) -> None:
    path = builtin_model_path()
    model = nnsight.TransformersModel(path, task="text-generation", dispatch=True)
    chosen = TranscoderSet.from_pretrained("builtin/per-layer").subset([0, 2])
    graph = attribute(model, chosen, examples("two-hop", "train", 1, 0)[0].prompt).prune()
    files = write_feature_files(bundle, tmp_path, graph)
    written = {f.stem for f in files}
    for node in graph.nodes():
        if node.kind == "feature":
            assert str(cantor(node.layer, node.index)) in written


def test_packed_files_as_the_page_reads_them(bundle: FeatureBundle, tmp_path: Path) -> None:
    index = json.loads(gzip.decompress(write_packed_features(bundle, tmp_path).read_bytes()))
    assert len(index) == 3
    for layer, feature in ((0, 0), (2, most_active(bundle, 2)), (2, bundle.n_features(2) - 1)):
        offsets, name = index[layer]["offsets"], index[layer]["filename"]
        assert len(offsets) == bundle.n_features(layer) + 1
        # A range request gives both ends.
        data = (tmp_path / name).read_bytes()[offsets[feature] : offsets[feature + 1] + 1]
        length = int.from_bytes(data[:4], "little")
        record = json.loads(zlib.decompress(data[4 : 4 + length]))
        assert record == json.loads(
            json.dumps(feature_json(bundle[layer, feature], f"layer_{layer}"))
        )
    assert index[1] == {"filename": "", "offsets": []}
    with pytest.raises(InputError, match="not \\[1\\]"):
        write_packed_features(bundle, tmp_path, [1])

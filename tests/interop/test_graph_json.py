"""Graph JSON: what is written, that it comes back, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from graphs import assert_same, exported, named, whole
from hypothesis import given
from hypothesis import strategies as st
from setups import IDS, model, transcoders

from nnsight_transcoders import AttributionGraph, attribute, validate_graph
from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.interop import read_json
from nnsight_transcoders.interop.names import cantor, defused, restored, uncantor
from nnsight_transcoders.interop.write_json import cumulative_influence

# -- what is written -----------------------------------------------------------------------------


def test_nodes_have_the_formats_names_and_numbers() -> None:
    graph, data = named(), exported()
    written = dict(zip((node.id for node in graph.nodes()), data["nodes"], strict=True))
    n = zoo.N_LAYERS
    for node in graph.nodes():
        found = written[node.id]
        layer, index, position = node.layer, node.index, node.position
        expected = {
            "feature": (
                f"{layer}_{index}_{position}",
                (layer + index) * (layer + index + 1) // 2 + index,
                str(layer),
                "cross layer transcoder",
            ),
            "error": (
                f"{layer}_error_mlp_{position}",
                -1,
                str(layer),
                "mlp reconstruction error",
            ),
            "token": (f"E_{index}_{position}", position, "E", "embedding"),
            "logit": (f"{n + 1}_{index}_{position}", index, str(n + 1), "logit"),
        }[node.kind]
        keys = ("node_id", "feature", "layer", "feature_type")
        assert tuple(found[key] for key in keys) == expected
        assert found["ctx_idx"] == position
        if node.kind == "feature":
            assert found["jsNodeId"] == f"{layer}_{index}-0"
            assert found["activation"] == node.value
        if node.kind == "logit":
            probability = float(graph.probability[node.number])
            assert f"(p={probability:.3f})" in found["clerp"]
            assert found["token_prob"] == probability
    assert sum(node["is_target_logit"] for node in data["nodes"]) == 1
    links = {(link["source"], link["target"]): link["weight"] for link in data["links"]}
    assert len(links) == graph.n_edges
    ids = [node["node_id"] for node in data["nodes"]]
    edges = zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    assert links == {(ids[s], ids[t]): w for s, t, w in edges}


def test_the_metadata_says_where_it_comes_from() -> None:
    data = exported(source_set="tiny-set", description="words", creator="someone")
    about = data["metadata"]
    assert (about["slug"], about["scan"]) == ("a-graph", "tiny")
    assert about["prompt_tokens"] == list(named().tokens)
    assert about["feature_details"] == {"neuronpedia_source_set": "tiny-set"}
    assert about["info"]["neuronpedia_source_set"] == "tiny-set"
    assert about["info"]["generator"]["name"] == "nnsight-transcoders"
    assert about["pruning_settings"] == {"node_threshold": 0.9, "edge_threshold": 0.98}
    assert about["generation_settings"]["max_n_logits"] == 10
    hosted = exported(feature_url="https://example.org/features/")["metadata"]
    assert hosted["feature_details"] == {"feature_json_base_url": "https://example.org/features"}
    assert "schema_version" not in hosted


def test_influence_is_the_share_of_all_that_is_at_least_as_influential() -> None:
    graph = whole()
    influence, shares = graph.influence(), cumulative_influence(graph)
    for i in range(0, graph.n_nodes, 17):
        expected = influence[influence >= influence[i]].sum() / influence.sum()
        assert float(shares[i]) <= float(expected) + 1e-9
        above = influence[influence > influence[i]].sum() / influence.sum()
        assert float(shares[i]) >= float(above) - 1e-9
    data = exported(graph)
    kept = [n["influence"] for n in data["nodes"] if n["feature_type"].startswith("cross")]
    assert max(kept) <= 0.8 + float(influence.max() / influence.sum())
    pruned = exported(graph.prune())
    assert [n["node_id"] for n in pruned["nodes"]] == [n["node_id"] for n in data["nodes"]]
    assert max(n["influence"] or 0 for n in pruned["nodes"]) <= 0.8 + 1e-9


def test_supernodes_are_pinned_with_their_members() -> None:
    params = exported()["qParams"]
    assert [group[0] for group in params["supernodes"]] == ["plain", defused("<b>bold</b>")]
    members = {i for group in params["supernodes"] for i in group[1:]}
    assert members < set(params["pinnedIds"])
    assert len(params["pinnedIds"]) == len(set(params["pinnedIds"])) == 6


def test_no_folder_of_this_machine_is_in_a_file() -> None:
    record = {"folder": "/home/somebody/set", "config": {"folder": "/home/somebody"}}
    graph = replace(
        named(),
        metadata={**named().metadata, "transcoders": record, "model": "/home/somebody/model"},
    )
    assert "somebody" not in json.dumps(exported(graph))


# -- and comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
def test_our_files_come_back_exactly(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pruned = whole(kind, dtype).prune()
    pruned.to_neuronpedia(tmp_path / "g.json", slug="s", model_id="m")
    assert_same(AttributionGraph.from_neuronpedia(tmp_path / "g.json"), pruned)
    path = pruned.to_circuit_tracer(tmp_path, slug="t", scan="owner/set")
    assert_same(AttributionGraph.from_circuit_tracer(path), pruned)


def test_names_come_back(tmp_path: Path) -> None:
    named().to_neuronpedia(tmp_path / "g.json", slug="s", model_id="m")
    assert_same(AttributionGraph.from_neuronpedia(tmp_path / "g.json"), named())


def test_directions_come_back() -> None:
    ways = [(f"way {i}", torch.randn(zoo.D_MODEL)) for i in range(2)]
    graph = attribute(model("llama"), transcoders("llama", "per-layer"), IDS, targets=ways).prune()
    assert graph.index[graph.of_kind("logit")].tolist() == [-1, -2]
    assert_same(AttributionGraph.from_neuronpedia(exported(graph)), graph)


def test_what_was_edited_in_the_file_is_what_comes_back() -> None:
    data = copy.deepcopy(exported())
    feature = next(n for n in data["nodes"] if n["feature_type"].startswith("cross"))
    data["qParams"]["supernodes"] = [["mine", feature["node_id"]], ["mine", feature["node_id"]]]
    data["qParams"]["pinnedIds"] = [feature["node_id"]]
    feature["clerp"] = "renamed"
    graph = AttributionGraph.from_neuronpedia(data)
    own = graph.node(0).id
    assert graph.metadata["supernodes"] == {"mine": [own], "mine (2)": [own]}
    assert graph.metadata["pinned"] == []
    assert graph.metadata["labels"][own] == "renamed"


def foreign() -> dict[str, Any]:
    """A graph as circuit-tracer 0.5 writes it: two layers, three tokens."""

    def node(name: str, feature: int, layer: str, at: int, kind: str, **more: Any) -> Any:
        about = {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": at}
        return {**about, "feature_type": kind, "jsNodeId": name, "clerp": "", **more}

    feature = "cross layer transcoder"
    return {
        "metadata": {
            "slug": "s",
            "scan": "owner/set",
            "transcoder_list": [],
            "prompt_tokens": ["<bos>", "a", "b"],
            "prompt": "<bos>ab",
            "node_threshold": 0.8,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": ["1_9_2"],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            node("0_7_1", cantor(0, 7), "0", 1, feature, influence=0.3, activation=2.0),
            node("1_9_2", cantor(1, 9), "1", 2, feature, influence=0.1, activation=0.5),
            node("0_1_2", -1, "1", 2, "mlp reconstruction error", influence=0.7),
            node("E_11_1", 1, "E", 1, "embedding"),
            node(
                "3_42_2",
                42,
                "3",
                2,
                "logit",
                clerp='Output " x" (p=0.750)',
                token_prob=0.75,
                is_target_logit=True,
            ),
        ],
        "links": [
            {"source": "E_11_1", "target": "0_7_1", "weight": 1.5},
            {"source": "0_7_1", "target": "1_9_2", "weight": -0.25},
            {"source": "1_9_2", "target": "3_42_2", "weight": 2.0},
            {"source": "0_1_2", "target": "3_42_2", "weight": 0.5},
        ],
    }


def test_another_tools_file_opens() -> None:
    graph = AttributionGraph.from_neuronpedia(foreign())
    ids = [node.id for node in graph.nodes()]
    assert ids == ["0_7_1", "1_9_2", "1_error_2", "E_11_1", "L_42_2"]
    assert graph.n_layers == 2
    assert graph.tokens == ("<bos>", "a", "b")
    assert graph.token_ids == (-1, 11, -1)
    assert graph.target_names == (" x",)
    assert graph.value.tolist() == [2.0, 0.5, 0.0, 0.0, 0.0]
    assert graph.adjacency()[4].tolist() == [0.0, 2.0, 0.5, 0.0, 0.0]
    assert graph.total.tolist() == [1.5, -0.25, 0.0, 0.0, 2.5]
    assert graph.metadata["pinned"] == ["1_9_2"]
    assert graph.metadata["graph_json"]["scan"] == "owner/set"
    assert "completeness not recorded" in graph.summary()
    assert graph.replacement_score == pytest.approx(0.8)
    assert "1_9_2" in graph.prune(1.0, 1.0).to_html()
    again = AttributionGraph.from_neuronpedia(graph.to_neuronpedia(slug="s", model_id="m"))
    assert_same(again, graph)


def test_colliding_names_are_told_apart_or_refused() -> None:
    data = foreign()
    data["nodes"][0] |= {"node_id": "0_1_2", "feature": cantor(0, 1), "ctx_idx": 2}
    data["links"] = data["links"][2:3]
    with pytest.raises(CheckpointError, match="twice.*collide with layer 0's features"):
        AttributionGraph.from_neuronpedia(data)


# -- what is refused -----------------------------------------------------------------------------


def drop(*path: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        *inner, last = path
        for key in inner:
            data = data[key]
        del data[last]

    return change


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        *inner, last = path
        for key in inner:
            data = data[key]
        data[last] = value

    return change


BROKEN: list[tuple[Callable[[Any], None], str]] = [
    (drop("metadata"), "the top level has no 'metadata'"),
    (drop("links"), "the top level has no 'links'"),
    (put([], "metadata"), "metadata is \\[\\], expected an object"),
    (drop("metadata", "slug"), "metadata has no 'slug'"),
    (put(7, "metadata", "prompt"), "prompt is 7, expected text"),
    (put(["a", 1, "b"], "metadata", "prompt_tokens"), "every token must be text"),
    (put([["label only"]], "qParams", "supernodes"), r"supernodes\[0\] must be \[label"),
    (put([3], "qParams", "pinnedIds"), "every entry must be a node id"),
    (put(["1_1_1"], "qParams", "pinnedIds"), "there is no node '1_1_1'"),
    (put([["x", "1_1_1"]], "qParams", "supernodes"), "supernode 'x': there is no node"),
    (put("a node", "nodes", 1), r"nodes\[1\] is a str"),
    (drop("nodes", 1, "clerp"), r"nodes\[1\] \('1_9_2'\) has no 'clerp'"),
    (drop("nodes", 0, "node_id"), r"nodes\[0\] has no 'node_id'"),
    (put(1.5, "nodes", 0, "ctx_idx"), "ctx_idx is 1.5, expected a whole number"),
    (put(True, "nodes", 0, "ctx_idx"), "ctx_idx is True, expected a whole number"),
    (put(3, "nodes", 0, "ctx_idx"), "ctx_idx 3 is outside the prompt's 3 tokens"),
    (put(-1, "nodes", 3, "ctx_idx"), "ctx_idx -1 is outside"),
    (put("lorsa", "nodes", 0, "feature_type"), "unknown feature_type 'lorsa'"),
    (put("x", "nodes", 0, "layer"), "layer 'x' is no number"),
    (put("1", "nodes", 0, "layer"), "node_id says layer 0, position 1"),
    (put("0_7", "nodes", 0, "node_id"), "a feature's node_id is"),
    (put(float("nan"), "nodes", 0, "activation"), r"\('0_7_1'\): activation is nan"),
    (put(float("inf"), "links", 0, "weight"), r"'E_11_1' -> '0_7_1'\): weight is inf"),
    (put("1.5", "links", 0, "weight"), "weight is '1.5', expected a number"),
    (put("E_11_9", "links", 0, "source"), "there is no node 'E_11_9'"),
    (put(5, "links", 0, "source"), "source is 5, expected text"),
    (put({"source": "1_9_2", "target": "0_7_1", "weight": 1}, "links", 0), "higher layer"),
    (put({"source": "1_9_2", "target": "1_9_2", "weight": 1}, "links", 0), "higher layer"),
    (put({"source": "E_11_1", "target": "0_1_2", "weight": 1}, "links", 0), "has no inputs"),
    (lambda data: data["links"].append(data["links"][0]), "this link is there twice"),
    (lambda data: data["nodes"].append(data["nodes"][0]), "is there twice"),
    (put([], "links") and drop("nodes", 4), "there is no"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_broken_graphs_are_refused_by_name(change: Callable[[Any], None], message: str) -> None:
    data = foreign()
    change(data)
    with pytest.raises(CheckpointError, match=message):
        AttributionGraph.from_neuronpedia(data)


PAGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("neuronpedia", put("owner/set", "metadata", "scan"), "metadata.scan is 'owner/set'.*gemma"),
    ("neuronpedia", put("a b", "metadata", "slug"), "metadata.slug is 'a b'"),
    ("neuronpedia", put('Output "x"', "nodes", 4, "clerp"), r"as '\(p=0.123\)'"),
    ("neuronpedia", drop("nodes", 4, "token_prob"), "a logit needs token_prob"),
    ("neuronpedia", drop("nodes", 0, "influence"), "need influence"),
    (
        "neuronpedia",
        put({"feature_json_base_url": "https://x"}, "metadata", "feature_details"),
        "leave schema_version out",
    ),
    ("circuit-tracer", drop("metadata", "transcoder_list"), "has no 'transcoder_list'"),
    ("circuit-tracer", drop("qParams", "sg_pos"), "qParams has no 'sg_pos'"),
    ("circuit-tracer", put(0, "nodes", 0, "layer"), "layer must be text"),
    ("circuit-tracer", put(None, "nodes", 2, "feature"), "feature must be a number"),
]


@pytest.mark.parametrize(("page", "change", "message"), PAGES, ids=[m for *_, m in PAGES])
def test_the_pages_own_rules(page: Any, change: Callable[[Any], None], message: str) -> None:
    data = foreign()
    if page == "neuronpedia":
        data["metadata"]["scan"] = "tiny"
    validate_graph(data, page)
    change(data)
    with pytest.raises(CheckpointError, match=message):
        validate_graph(data, page)


def test_a_graph_whose_nodes_are_all_in_layer_0() -> None:
    data = foreign()
    data["nodes"] = [data["nodes"][i] for i in (0, 3, 4)]
    data["links"] = data["links"][:1]
    data["qParams"]["pinnedIds"] = []
    validate_graph(data)
    with pytest.raises(CheckpointError, match="above layer 0"):
        validate_graph(data, "circuit-tracer")


def test_many_findings_are_listed_up_to_a_point() -> None:
    data = foreign()
    data["links"] = [{"source": "no", "target": "no", "weight": 1.0}] * 100
    with pytest.raises(CheckpointError, match="and 80 more"):
        validate_graph(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metadata": NaN}', "it has NaN"),
        ('{"metadata": -Infinity}', "it has -Infinity"),
        ("[1, 2]", "expected a graph's object"),
        ('{"metadata": ', "cannot read"),
        ("[" * 100_000, "cannot read"),
        ('{"metadata": ' + "9" * 10_000 + "}", "cannot read"),
        ("\x00", "cannot read"),
    ],
)
def test_files_that_are_no_graphs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "g.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        AttributionGraph.from_neuronpedia(path)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        AttributionGraph.from_neuronpedia(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="cannot read"):
        AttributionGraph.from_neuronpedia(tmp_path / "bytes.json")
    monkeypatch.setattr(read_json, "MAX_BYTES", 10)
    (tmp_path / "large.json").write_text(json.dumps(foreign()))
    with pytest.raises(CheckpointError, match="at most 10 are read"):
        AttributionGraph.from_neuronpedia(tmp_path / "large.json")


@pytest.mark.parametrize(
    "change",
    [
        put({}, "metadata", "nnsight_transcoders"),
        put([1, 2], "nodes", 0, "nnsight_transcoders"),
        put([1, 2, 3, "4"], "nodes", 0, "nnsight_transcoders"),
        drop("nodes", 0, "nnsight_transcoders"),
        put(["x"], "metadata", "nnsight_transcoders", "target_names"),
        put([], "metadata", "nnsight_transcoders", "token_ids"),
        put("int8", "metadata", "nnsight_transcoders", "dtype"),
    ],
)
def test_our_own_records_are_not_trusted_either(change: Callable[[Any], None]) -> None:
    data = copy.deepcopy(exported())
    change(data)
    with pytest.raises(CheckpointError, match="records are damaged"):
        AttributionGraph.from_neuronpedia(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slug": "a/b"}, "slug 'a/b'"),
        ({"slug": ".."}, "slug '..'"),
        ({"slug": ""}, "slug ''"),
        ({"model_id": "owner/model"}, "model_id"),
        ({"source_set": "x y"}, "source_set"),
        ({"source_set": "x", "feature_url": "https://x"}, "not both"),
        ({"feature_url": "http://x"}, "must start with https"),
    ],
)
def test_names_that_cannot_be_in_an_address(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        named().to_neuronpedia(**{"slug": "s", "model_id": "m", **options})


# -- circuit-tracer's folder ---------------------------------------------------------------------


def test_a_folder_lists_its_graphs(tmp_path: Path) -> None:
    for slug in ("one", "two", "one"):
        named().to_circuit_tracer(tmp_path, slug=slug, scan="owner/set")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in listed] == ["two", "one"]
    assert {graph["scan"] for graph in listed} == {"owner/set"}
    validate_graph(json.loads((tmp_path / "one.json").read_text()), "circuit-tracer")
    with pytest.raises(InputError, match="needs slug="):
        named().to_circuit_tracer(tmp_path)
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(CheckpointError, match="list of graphs"):
        named().to_circuit_tracer(tmp_path, slug="three", scan="x")
    assert not (tmp_path / "three.json").exists()


# -- text ----------------------------------------------------------------------------------------


def opens_a_tag(text: str) -> bool:
    """By the rule of HTML, but for special tokens."""
    special = re.sub(r"</?(bos|eos|pad|unk|mask|s|[a-z]+_[a-z_]+)>", "", text)
    return re.search(r"<[A-Za-z/!?]", special) is not None


def test_special_tokens_stay_and_tags_do_not() -> None:
    for token in ("<bos>", "</s>", "<|endoftext|>", "<start_of_turn>", "a < b", "<3", "<<"):
        assert defused(token) == token
    for tag in ("<b>", "<script>", "<s onclick=x>", "<!--", "<bos onload=x>", "<a_b c>", "<S>"):
        assert defused(tag) == f"<\u200b{tag[1:]}"


def test_no_tag_starts_in_a_file() -> None:
    prompt = replace(named(), tokens=("<img src=x onerror=alert(1)>", *named().tokens[1:]))
    data = exported(prompt)
    texts = [node["clerp"] for node in data["nodes"]] + data["metadata"]["prompt_tokens"]
    texts += [data["metadata"]["prompt"], *(g[0] for g in data["qParams"]["supernodes"])]
    assert any("script" in text for text in texts)
    assert any("onerror" in text for text in texts)
    assert not [text for text in texts if opens_a_tag(text)]
    assert AttributionGraph.from_neuronpedia(data).tokens == prompt.tokens


@given(st.text() | st.text("<>/!s_bo \u200b", max_size=12))
def test_defused_text_has_no_tags_and_comes_back(text: str) -> None:
    assert not opens_a_tag(defused(text))
    if "<\u200b" not in text:
        assert restored(defused(text)) == text


@given(st.integers(0, 500), st.integers(0, 10**7))
def test_cantor_numbers_come_back(layer: int, feature: int) -> None:
    assert uncantor(cantor(layer, feature)) == (layer, feature)

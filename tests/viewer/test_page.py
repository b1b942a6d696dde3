"""The page as text: its data and its safety."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.viewer import page
from nnsight_transcoders.viewer.page import notebook_frame, page_data, render_graph

VIEWER = Path(page.__file__).parent
HOSTILE = "</script><script>alert(1)</script><!-- \u2028\u2029 \"quotes\" 'and' & <b>$data</b> \\"

MakeGraph = Callable[..., AttributionGraph]


class _Elements(HTMLParser):
    """Collects the elements of a page, and the text of its data element."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._in_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("id") == "graph-data"

    def handle_endtag(self, tag: str) -> None:
        self._in_data = self._in_data and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


def parse(text: str) -> _Elements:
    elements = _Elements()
    elements.feed(text)
    return elements


# -- data ----------------------------------------------------------------------------------------


def test_data_comes_back_from_the_page(make_graph: MakeGraph) -> None:
    graph = make_graph()
    data = json.loads(parse(render_graph(graph)).data)
    assert data == page_data(graph)
    assert data["tokens"] == list(graph.tokens)
    assert data["nodes"]["id"] == [node.id for node in graph.nodes()]
    assert data["nodes"]["kind"] == [node.kind for node in graph.nodes()]
    assert data["edges"]["source"] == graph.source.tolist()
    assert torch.equal(torch.tensor(data["edges"]["weight"]), graph.weight)
    for name in ("value", "total", "bias", "omitted", "probability"):
        assert torch.equal(torch.tensor(data["nodes"][name]), getattr(graph, name))
    assert data["scores"]["replacement_score"] == graph.replacement_score
    assert data["pruning"] is None
    assert data["metadata"] == graph.metadata


def test_pruned_graph_names_its_thresholds(make_graph: MakeGraph) -> None:
    data = page_data(make_graph().prune(0.7, 0.9))
    assert data["pruning"]["node_threshold"] == 0.7
    assert data["pruning"]["nodes_before"] == make_graph().n_nodes
    assert "pruning" not in data["metadata"]


def test_most_influential_edges_are_kept(make_graph: MakeGraph) -> None:
    graph = make_graph()
    data = page_data(graph, max_edges=50)
    assert data["n_edges"] == graph.n_edges
    assert len(data["edges"]["weight"]) == 50
    kept = set(zip(data["edges"]["source"], data["edges"]["target"], strict=True))
    reach = graph.influence() + graph.logit_weights()
    size = graph.weight.abs().double()
    sums = torch.zeros(graph.n_nodes).double().index_add_(0, graph.target, size)
    best = (size / sums[graph.target] * reach[graph.target]).topk(50).indices
    assert kept == {(int(graph.source[e]), int(graph.target[e])) for e in best}
    # What fell away is counted as omitted, so every target still closes.
    table = {name: torch.tensor(data["nodes"][name]) for name in ("total", "bias", "omitted")}
    incoming = torch.zeros(graph.n_nodes).index_add_(
        0, torch.tensor(data["edges"]["target"]), torch.tensor(data["edges"]["weight"])
    )
    left = table["total"] - incoming - table["bias"] - table["omitted"]
    assert left[graph.is_target].abs().max() < 1e-4


def test_details_only_for_features_in_the_graph(
    make_graph: MakeGraph, make_details: Callable[[AttributionGraph], dict[str, Any]]
) -> None:
    graph = make_graph()
    details = make_details(graph)
    data = page_data(graph, feature_details={**details, "99_1": {"label": "elsewhere"}})
    assert data["feature_details"] == details


@pytest.mark.parametrize("name", ["weight", "value", "bias", "total"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    make_graph: MakeGraph, name: str, bad: float
) -> None:
    graph = make_graph()
    table = getattr(graph, name).clone()
    table[3] = bad
    with pytest.raises(InputError, match="holds finite numbers"):
        render_graph(dataclasses.replace(graph, **{name: table}))


def test_details_that_are_not_json_are_refused(make_graph: MakeGraph) -> None:
    graph = make_graph()
    node = next(n for n in graph.nodes() if n.kind == "feature")
    key = f"{node.layer}_{node.index}"
    for bad in (float("nan"), {1, 2}):
        with pytest.raises(InputError, match="feature_details"):
            render_graph(graph, feature_details={key: {"top_logits": [["a", bad]]}})
    with pytest.raises(InputError, match="max_edges"):
        render_graph(graph, max_edges=-1)


# -- safety --------------------------------------------------------------------------------------


def test_hostile_text_stays_data(make_graph: MakeGraph) -> None:
    plain = make_graph()
    graph = dataclasses.replace(
        plain,
        tokens=(HOSTILE, *plain.tokens[1:]),
        target_names=(HOSTILE, *plain.target_names[1:]),
        metadata={**plain.metadata, "model": HOSTILE},
    )
    node = next(n for n in graph.nodes() if n.kind == "feature")
    details = {f"{node.layer}_{node.index}": {"label": HOSTILE}}
    text = render_graph(graph, title=HOSTILE, feature_details=details)
    found, usual = parse(text), parse(render_graph(plain))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in usual.tags]
    data = json.loads(found.data)
    assert data["title"] == data["tokens"][0] == data["target_names"][0] == HOSTILE
    assert data["metadata"]["model"] == HOSTILE
    assert "\u2028" not in found.data
    assert text.count("</script>") == 2


def test_page_loads_nothing(make_graph: MakeGraph) -> None:
    text = render_graph(make_graph())
    elements = parse(text).tags
    policy = next(a["content"] for t, a in elements if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline'")
    assert not [(t, a) for t, a in elements if "src" in a or "href" in a or "srcset" in a]
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in addresses), addresses
    assert "@import" not in text
    assert "url(" not in (VIEWER / "assets" / "viewer.css").read_text(encoding="utf-8")


def test_frame_holds_the_page(make_graph: MakeGraph) -> None:
    graph = make_graph()
    frame = notebook_frame(graph, height=500)
    ((tag, attributes),) = parse(frame).tags
    assert tag == "iframe"
    assert attributes["srcdoc"] == render_graph(graph)
    assert "allow-same-origin" not in (attributes["sandbox"] or "")
    assert "500px" in (attributes["style"] or "")
    assert graph._repr_html_() == notebook_frame(graph)
    few = json.loads(parse(html.unescape(notebook_frame(graph, max_edges=7))).data)
    assert len(few["edges"]["weight"]) == 7


def test_to_html_writes_the_page(make_graph: MakeGraph, tmp_path: Path) -> None:
    graph = dataclasses.replace(make_graph(), target_names=("\ud800", *"bcdef"))
    text = graph.to_html(tmp_path / "page.html", title="a \ud800 b")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text

"""The builtin model's two-hop circuit, from the model to the page (marker ``browser``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nnsight import TransformersModel

from nnsight_transcoders import (
    AttributionGraph,
    FeatureBundle,
    TranscoderSet,
    attribute,
    builtin_model_path,
    collect_features,
)
from nnsight_transcoders.builtin.text import sentences, two_hop
from nnsight_transcoders.viewer.page import render_graph

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttributionGraph, FeatureBundle]:
    """The pruned graph of the capital of a city's state, and what its features respond to."""
    model = TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)
    transcoders = TranscoderSet.from_pretrained("builtin/per-layer")
    folder: Path = tmp_path_factory.mktemp("two-hop") / "features"
    bundle = collect_features(model, transcoders, sentences(400, seed=3), folder)
    graph = attribute(model, transcoders, two_hop("Dallas").prompt)
    return graph, bundle


def test_the_two_hop_graph(page: Any, circuit: tuple[AttributionGraph, FeatureBundle]) -> None:
    graph, bundle = circuit
    pruned = graph.prune()
    influence = pruned.influence()
    features = pruned.of_kind("feature").tolist()
    ranked = sorted(features, key=lambda i: -float(influence[i]))
    best = pruned.node(next(i for i in ranked if pruned.layer[i] > 0))
    bundle.labels[best.layer, best.index] = "the capital's name <i>"
    page.open(render_graph(graph, feature_details=bundle.details(graph)))

    # Nodes are drawn.
    assert sorted(page.ids()) == sorted(node.id for node in pruned.nodes())
    assert len(page.all("#stage .node.token")) == len(graph.tokens)
    assert " Austin" in graph.target_names
    assert any("Austin" in chip.text for chip in page.all("#stage .node.logit"))

    # A click selects and fills the panel.
    page.one(f'#stage [data-id="{best.id}"]').click()
    assert page.selected() == best.id
    panel = page.text("#panel")
    report = bundle[best.layer, best.index]
    assert page.text(".meaning") == "the capital's name <i>"
    for heading in ("Inputs", "Outputs", "Where it comes from", "Raises", "Examples"):
        assert heading in panel
    assert len(page.all(".examples li")) == min(5, len(report.examples))
    shown = "".join(e.text for e in page.all(".examples li:first-child .running > span"))
    assert "".join(report.examples[0].tokens).replace(" ", "") in shown.replace(" ", "")
    assert page.all(".histogram .bars rect")
    page.shot("two-hop-selected")

    # The slider changes the number of nodes.
    before = len(page.ids())
    page.slide("node", 0.5)
    fewer = graph.prune(0.5, 0.98)
    assert sorted(page.ids()) == sorted(node.id for node in fewer.nodes())
    assert len(page.ids()) < before
    page.slide("node", 0.8)
    assert len(page.ids()) == before

    # Nodes are pinned and grouped.
    chosen = [best, *(pruned.node(i) for i in ranked if pruned.node(i) != best)][:3]
    for node in chosen:
        page.one(f'#stage [data-id="{node.id}"]').click()
        page.one("#panel .pin").click()
    assert len(page.all("#stage .pinned")) == 3
    page.one("#tab-pins").click()
    for node in chosen[:2]:
        page.one(f'.pin-row input[value="{node.id}"]').click()
    page.one(".group-form input").send_keys("state to capital")
    page.one(".group-form button").click()
    assert page.text(".group h3 span") == "state to capital"
    assert len(page.all(".units .unit")) == 2
    page.shot("two-hop-groups")
    # That there was no console message and no request is checked when the fixture ends.

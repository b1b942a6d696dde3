"""The page in headless Chromium (marker ``browser``; needs chromium, chromedriver and selenium)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.viewer.page import notebook_frame, render_graph

keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

pytestmark = pytest.mark.browser

MakeGraph = Callable[..., AttributionGraph]
HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'
SIZES = {"wide": (1280, 800), "narrow": (900, 700), "phone": (420, 800)}


def download(page: Any, selector: str) -> Any:
    """The JSON that a click on a button saves."""
    behaviour = {"behavior": "allow", "downloadPath": str(page.folder)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    page.one(selector).click()
    path = page.folder / "circuit-state.json"
    page.until(lambda: path.exists() and path.stat().st_size > 0)
    return json.loads(path.read_text(encoding="utf-8"))


def best_feature(graph: AttributionGraph) -> Any:
    """The most influential feature that has inputs."""
    influence = graph.influence().masked_fill((graph.kind != 0) | (graph.layer == 0), 0.0)
    return graph.node(int(influence.argmax()))


def test_nodes_are_drawn_and_a_click_fills_the_panel(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph()
    page.open(render_graph(graph), "#n=1&e=1")
    assert sorted(page.ids()) == sorted(node.id for node in graph.nodes())
    assert len(page.all("#stage .node.feature")) == len(graph.of_kind("feature"))
    node = best_feature(graph)
    page.one(f'#stage [data-id="{node.id}"]').click()
    assert page.selected() == node.id
    assert f"s={node.id}" in page.run("return location.hash")
    panel = page.text("#panel")
    assert f"Feature {node.index}" in panel
    assert "pre-activation" in panel
    source, weight = graph.edges_into(node.number)[0]
    row = page.one("#panel .links .row")
    assert row.get_attribute("data-goto") == source.id
    assert f"{abs(weight):.3g}"[:3] in row.text
    row.click()
    assert page.selected() == source.id
    page.press(keys.ESCAPE)
    assert page.selected() is None
    assert "Overview" in page.text("#panel")
    page.shot("small")


def test_sliders_prune_as_python_does(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph(n_features=200, n_edges=4000, n_layers=8)
    page.open(render_graph(graph))
    assert sorted(page.ids()) == sorted(n.id for n in graph.prune().nodes())
    for node, edge in ((0.6, 0.98), (0.6, 0.7), (0.9, 0.7), (1.0, 0.7), (0.8, 0.98)):
        page.slide("node", node)
        page.slide("edge", edge)
        pruned = graph.prune(node, edge)
        assert sorted(page.ids()) == sorted(n.id for n in pruned.nodes())
        assert page.text("#counts").startswith(f"{pruned.n_nodes} of")
        assert f"{pruned.n_edges:,} of 4,000 edges" in page.text("#counts")
        assert f"replacement {pruned.replacement_score:.3f}" in page.text("#scores")
        assert f"completeness {pruned.completeness_score:.3f}" in page.text("#scores")


def test_pruned_graph_opens_whole(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph().prune()
    page.open(render_graph(graph))
    assert len(page.ids()) == graph.n_nodes
    assert page.text("#scores").startswith(f"replacement {graph.replacement_score:.3f}")


def test_keyboard(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph()
    page.open(render_graph(graph), "#n=1&e=1")
    page.press(keys.ARROW_UP)
    first = page.selected()
    assert first is not None
    page.press(keys.ARROW_UP)
    second = page.selected()
    assert second not in (None, first)
    layer = {node.id: node.layer for node in graph.nodes()}
    assert layer[second] > layer[first]
    page.press("p")
    assert "Pinned 1" in page.text("#tabs")
    node = best_feature(graph)
    page.press("/")
    page.press(str(node.index))
    assert page.one("#hits [role=option]").is_displayed()
    assert page.all(f'#stage .hit[data-id="{node.id}"]')
    page.press(keys.ENTER)
    assert page.selected() == node.id
    page.press(keys.ESCAPE)
    assert not page.all("#stage .hit")
    page.press(keys.ESCAPE)
    assert page.selected() is None


def test_search_words_have_to_fit_all(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph()
    page.open(render_graph(graph), "#n=1&e=1")
    page.one("#search").send_keys("feature L2 @9")
    expected = {n.id for n in graph.nodes() if (n.kind, n.layer, n.position) == ("feature", 2, 9)}
    found = {e.get_attribute("data-id") for e in page.all("#stage .hit")}
    assert found == expected


def test_feature_details_and_hostile_labels(
    page: Any, make_graph: MakeGraph, make_details: Callable[..., Any]
) -> None:
    graph = make_graph()
    graph = dataclasses.replace(graph, tokens=(HOSTILE, *graph.tokens[1:]))
    details = make_details(graph)
    key = next(iter(details))
    details[key]["label"] = HOSTILE
    node = next(n for n in graph.nodes() if f"{n.layer}_{n.index}" == key)
    page.open(render_graph(graph, title=HOSTILE, feature_details=details), f"#n=1&e=1&s={node.id}")
    assert page.text("h1") == HOSTILE
    assert page.text(".meaning") == HOSTILE
    assert not page.all("img")
    panel = page.text("#panel")
    for heading in ("Raises", "Lowers", "Tokens that switch it on", "Examples", "On the text"):
        assert heading in panel
    assert len(page.all(".examples .lit")) == 3
    assert len(page.all(".histogram .bars rect")) == 3
    page.shot("details")


def test_pins_and_groups_stay_in_the_address(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph(n_features=30, n_edges=500)
    a, b, c = (
        next(n.id for n in graph.nodes() if (n.kind, n.layer) == ("feature", la))
        for la in (0, 1, 3)
    )
    text = render_graph(graph)
    page.open(text, f"#n=1&e=1&p={a},{b},{c}")
    assert len(page.all("#stage .pinned")) == 3
    page.one("#tab-pins").click()
    for identifier in (a, b):
        page.one(f'.pin-row input[value="{identifier}"]').click()
    page.one(".group-form input").send_keys("digits <b>")
    page.one(".group-form button").click()
    assert page.text(".group h3 span") == "digits <b>"
    dense = graph.adjacency()
    number = {n.id: n.number for n in graph.nodes()}
    total = float(dense[number[c], number[a]] + dense[number[c], number[b]])
    flow = page.text(".flow .weight").replace("\u2212", "-")
    assert float(flow) == pytest.approx(total, rel=6e-3)
    page.shot("groups")
    saved = download(page, "#save-state")
    assert saved == {
        "pinnedIds": [a, b, c],
        "supernodes": [["digits <b>", a, b]],
        "clickedId": None,
        "thresholds": {"node": 1, "edge": 1},
    }
    address = page.run("return location.hash")
    page.open(text, address)
    page.one("#tab-pins").click()
    assert page.text(".group h3 span") == "digits <b>"
    page.open(text)
    page.one("#tab-pins").click()
    page.one("#open-file").send_keys(str(page.folder / "circuit-state.json"))
    page.until(lambda: page.all(".group h3 span"))
    assert page.text(".group h3 span") == "digits <b>"
    assert page.run("return location.hash") == address
    # A third node joins the group by its name.
    page.one(f'.pin-row input[value="{c}"]').click()
    page.one(".group-form input").send_keys("digits <b>")
    page.one(".group-form button").click()
    assert len(page.all(".group .pin-row")) == 3
    wrong = page.folder / "wrong.json"
    wrong.write_text("[1]")
    page.one("#open-file").send_keys(str(wrong))
    page.until(lambda: page.one(".files .warn").is_displayed())
    assert len(page.all(".group .pin-row")) == 3


def test_groups_pins_and_labels_of_the_graph_are_there(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph()
    a, b, c, *_ = (node for node in graph.nodes() if node.kind == "feature")
    named = graph.named({"pair <i>": [a, b]}, pinned=[c], labels={a: "a label <b>"})
    page.open(render_graph(named), f"#n=1&e=1&s={a.id}")
    assert page.text(".meaning") == "a label <b>"
    assert page.text("#tab-pins") == "Pinned 3"
    page.one("#tab-pins").click()
    assert page.text(".group h3 span") == "pair <i>"
    assert "p=" not in page.run("return location.hash")
    page.one(f'.pin-row [aria-label^="Unpin"][aria-label*="{c.index}"]').click()
    assert "p=" in page.run("return location.hash")


def test_connections_are_forbidden(open_page: Any, make_graph: MakeGraph) -> None:
    page = open_page
    page.open(render_graph(make_graph()))
    script = """
    const done = arguments[0];
    fetch("http://127.0.0.1:9/").then(() => done("sent"), (error) => done(error.name));
    """
    assert page.driver.execute_async_script(script) == "TypeError"
    assert any("Content Security Policy" in message for message in page.complaints())


def test_frame_in_a_notebook(page: Any, make_graph: MakeGraph) -> None:
    graph = make_graph().prune()
    body = f"<!doctype html><title>notebook</title><body><p>Out[1]</p>{notebook_frame(graph)}"
    path = page.folder / "notebook.html"
    path.write_text(body, encoding="utf-8")
    page.driver.get(path.as_uri())
    page.driver.switch_to.frame(page.one("iframe"))
    page.until(lambda: page.run("return document.documentElement.dataset.ready") == "true")
    assert len(page.ids()) == graph.n_nodes
    node = best_feature(graph)
    page.one(f'#stage [data-id="{node.id}"]').click()
    assert f"Feature {node.index}" in page.text("#panel")
    page.driver.switch_to.default_content()
    page.shot("notebook")


def test_cut_edges_are_named(page: Any, make_graph: MakeGraph) -> None:
    page.open(render_graph(make_graph(), max_edges=100))
    assert "100 edges with the largest influence, of 300" in page.text("#notice")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_big_graph(page: Any, make_graph: MakeGraph, size: str, theme: str) -> None:
    graph = make_graph(n_features=750, n_edges=100_000, n_layers=26)
    assert graph.n_nodes == 1000
    page.open(render_graph(graph), f"#n=1&e=1&theme={theme}", SIZES[size])
    assert len(page.ids()) == 1000
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.shot(f"big-{size}-{theme}")
    times = page.run(
        """
        const ids = arguments[0].map((id) => document.querySelector(`#stage [data-id="${id}"]`));
        return ids.map((element) => {
          const start = performance.now();
          element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
          document.body.offsetHeight;
          return performance.now() - start;
        });
        """,
        [node.id for node in list(graph.nodes())[::50]],
    )
    assert sorted(times)[len(times) // 2] < 100, times
    page.slide("node", 0.7)
    assert len(page.ids()) == graph.prune(0.7, 1.0).n_nodes
    page.shot(f"big-pruned-{size}-{theme}")

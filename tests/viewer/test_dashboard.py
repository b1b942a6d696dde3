"""Feature dashboards: the page as text, and in headless Chromium (marker ``browser``)."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.viewer.dashboard import render_features

HOSTILE = '"></script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'


def feature(layer: int = 1, index: int = 7, label: str | None = "years") -> dict[str, Any]:
    """What is known about one feature."""
    example = {
        "tokens": ["In", " 17", "45", ", the", "\n"],
        "activations": [0.0, 1.5, 4.0, 0.25, 0.0],
        "peak": 2,
        "context": 3,
        "start": 0,
    }
    weak = {**example, "activations": [0.0, 0.5, 0.0, 0.0, 0.0], "peak": 1}
    return {
        "layer": layer,
        "index": index,
        "label": label,
        "label_source": "somebody",
        "label_scores": {"detection": 0.875},
        "n_active": 1234,
        "density": 0.000123 * (index + 1),
        "max_activation": 4.0,
        "mean_activation": 1.25,
        "histogram": {"counts": [1000, 200, 30, 4, 0, 0, 0, 0], "width": 1.0},
        "groups": [
            {
                "name": "Top",
                "low": 4.0,
                "high": 4.0,
                "examples": [{**example, "seen": 3}, *[example] * 6],
            },
            {"name": "0 to 1", "low": 0.0, "high": 1.0, "examples": [weak]},
        ],
        "top_logits": [[" 46", 2.5], [" 45", 1.0]],
        "bottom_logits": [[" the", -1.5]],
        "de_embedding": [["17", 3.0]],
        "coactive": [
            {"layer": 1, "index": 8, "overlap": 0.5},
            {"layer": 0, "index": 99, "overlap": 0.25},
        ],
    }


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        self.tags.append(tag)


def tags(text: str) -> list[str]:
    parser = _Tags()
    parser.feed(text)
    return parser.tags


# -- the page as text ----------------------------------------------------------------------------


def test_the_data_comes_back_and_nothing_is_loaded_from_outside() -> None:
    text = render_features([feature()], title="One")
    (data,) = re.findall(r'id="feature-data">(.*?)</script>', text, re.S)
    assert json.loads(data) == {"version": 1, "title": "One", "features": [feature()]}
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:link|script|img)[^>]*(?:src|href)=", text)


def test_hostile_text_stays_data() -> None:
    bad = feature(label=HOSTILE)
    bad["groups"][0]["examples"][0]["tokens"][0] = HOSTILE
    bad["top_logits"][0][0] = bad["label_source"] = HOSTILE
    text = render_features([bad], title=HOSTILE)
    assert tags(text) == tags(render_features([feature()], title="One"))


def test_what_is_no_json_is_refused() -> None:
    for value in (float("nan"), {1}):
        with pytest.raises(InputError, match="cannot be written as JSON"):
            render_features([{**feature(), "density": value}], title="One")


# -- in a browser --------------------------------------------------------------------------------

browser_only = pytest.mark.browser


@browser_only
def test_one_feature(page: Any) -> None:
    page.open(render_features([feature()], title="One"))
    assert not page.one("#side").is_displayed()
    text = page.text("#feature")
    for part in (
        "Feature 7 of layer 1",
        "years",
        "by somebody, detection 0.88",
        "1,234 positions",
        "Largest activations",
        "Activation 0 to 1",
        "Raises",
        "Lowers",
        "Tokens that switch it on",
        "Active with",
        "Show 2 more",
    ):
        assert part in text
    assert len(page.all(".histogram .bars rect")) == 4
    assert len(page.all(".examples")[0].find_elements("css selector", ".lit")) == 15
    assert [e.text for e in page.all(".examples .seen")] == ["×3"]
    page.one(".examples ~ .more").click()
    assert len(page.all(".examples")[0].find_elements("css selector", "li")) == 7
    strengths = [e.get_attribute("style") for e in page.all(".examples li:first-child .lit")[:3]]
    assert [re.sub(r"\D", "", s) for s in strengths] == ["33", "70", "14"]
    # Heading, facts, lists and examples stand below one another.
    tops = [page.one(f"#feature {part}").location["y"] for part in ("h2", ".facts", ".pairs", "ol")]
    assert tops == sorted(set(tops))
    page.shot("dashboard-one")


@browser_only
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_many_features(page: Any, theme: str) -> None:
    features = [feature(la, i, f"label {i}" if i % 2 else None) for la in (0, 1) for i in range(9)]
    page.open(render_features(features, title="Many"), "#1_7")
    page.one("#theme").click()
    if theme == "dark":
        page.one("#theme").click()
    assert len(page.all("#list button")) == 18
    assert "Feature 7 of layer 1" in page.text("#feature")
    page.one('#feature [data-goto="1_8"]').click()
    assert "Feature 8 of layer 1" in page.text("#feature")
    assert page.run("return location.hash") == "#1_8"
    page.press("/")
    page.press("label 3")
    assert [e.get_attribute("data-goto") for e in page.all("#list button")] == ["0_3", "1_3"]
    page.press("\ue015")  # arrow down
    assert "Feature 3 of layer 0" in page.text("#feature")
    page.press("\ue015")
    assert "Feature 3 of layer 1" in page.text("#feature")
    page.press("\ue00c")  # Escape
    assert len(page.all("#list button")) == 18
    page.shot(f"dashboard-many-{theme}")


@browser_only
def test_hostile_labels_are_text(page: Any) -> None:
    bad, other = feature(label=HOSTILE), feature(index=8)
    bad["groups"] = copy.deepcopy(bad["groups"])
    bad["groups"][0]["examples"][0]["tokens"][0] = HOSTILE
    page.open(render_features([bad, other], title=HOSTILE))
    assert page.text(".meaning") == HOSTILE.replace("\u2028", "\\u2028")
    assert not page.all("img")


@browser_only
def test_a_feature_that_is_never_active(page: Any) -> None:
    dead = feature(label=None) | {
        "n_active": 0,
        "density": 0.0,
        "max_activation": 0.0,
        "histogram": {"counts": [0] * 8, "width": 0.0},
        "groups": [],
        "coactive": [],
    }
    page.open(render_features([dead], title="Dead"))
    assert "Never active on the text" in page.text("#feature")
    assert not page.all(".histogram")


@browser_only
def test_on_a_phone(page: Any) -> None:
    page.open(render_features([feature(), feature(index=8)], title="Two"), size=(420, 800))
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.shot("dashboard-phone")

"""Synthetic attribution graphs with the shape of real ones, and a browser to show them in."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_transcoders.circuits.graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph

#: Where screenshots are kept (ignored by git).
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"

TOKENS = ("<bos>", "The", " war", " lasted", " from", " ", "173", "2", " to", " 17")
TARGETS = ("49", "50", "63", " the", "\n", "8")


def _nodes(n_features: int, n_layers: int, n_tokens: int, draw: torch.Generator) -> torch.Tensor:
    """Rows of (kind, layer, position, index): more features at later tokens, an error per cell."""
    favour = torch.linspace(0.3, 1.0, n_tokens) ** 2
    layers = torch.randint(n_layers, (n_features,), generator=draw).tolist()
    places = torch.multinomial(favour, n_features, replacement=True, generator=draw).tolist()
    numbers = torch.randperm(max(24_576, n_features), generator=draw)[:n_features].tolist()
    rows = [
        (FEATURE, la, p, i)
        for la, p, i in sorted(zip(layers, places, numbers, strict=True), key=lambda row: row[0])
    ]
    rows += [(ERROR, la, p, -1) for la in range(n_layers) for p in range(1, n_tokens)]
    rows += [(TOKEN, -1, p, 100 + p) for p in range(n_tokens)]
    rows += [(LOGIT, n_layers, n_tokens - 1, 200 + i) for i in range(len(TARGETS))]
    return torch.tensor(rows)


def _edges(nodes: torch.Tensor, n_edges: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Random edges that go up in layers and not back in tokens, with a few large weights."""
    kind, layer, position, _ = nodes.T
    allowed = (layer[:, None] > layer[None, :]) & (position[:, None] >= position[None, :])
    allowed &= ((kind == FEATURE) | (kind == LOGIT))[:, None] & (kind != LOGIT)[None, :]
    pairs = allowed.nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=draw)[:n_edges]]
    spread = torch.randn(len(pairs), generator=draw)
    weight = torch.randn(len(pairs), generator=draw) * torch.exp(1.4 * spread)
    weight = torch.where(kind[pairs[:, 1]] == ERROR, 0.3 * weight, weight)
    return pairs[:, 1].contiguous(), pairs[:, 0].contiguous(), weight


def build_graph(
    n_features: int = 40,
    n_edges: int = 300,
    n_layers: int = 4,
    n_tokens: int = len(TOKENS),
    seed: int = 0,
) -> AttributionGraph:
    """A random graph that closes: every target's total is what its row sums to."""
    draw = torch.Generator().manual_seed(seed)
    nodes = _nodes(n_features, n_layers, n_tokens, draw)
    source, target, weight = _edges(nodes, n_edges, draw)
    kind, layer, position, index = (column.contiguous() for column in nodes.T)
    is_target = (kind == FEATURE) | (kind == LOGIT)
    bias = torch.randn(len(kind), generator=draw) * is_target
    omitted = 0.2 * torch.randn(len(kind), generator=draw) * is_target
    probability = torch.zeros(len(kind))
    probability[kind == LOGIT] = torch.tensor([0.41, 0.22, 0.11, 0.06, 0.03, 0.01])
    return AttributionGraph(
        kind=kind,
        layer=layer,
        position=position,
        index=index,
        value=3 * torch.rand(len(kind), generator=draw),
        source=source,
        target=target,
        weight=weight,
        total=(bias + omitted).index_add(0, target, weight),
        bias=bias,
        omitted=omitted,
        probability=probability,
        tokens=tuple(TOKENS[i % len(TOKENS)] for i in range(n_tokens)),
        token_ids=tuple(range(100, 100 + n_tokens)),
        target_names=TARGETS,
        metadata={
            "n_layers": n_layers,
            "model": "tests/synthetic",
            "transcoders": "tests/per-layer",
            "settings": {"max_feature_nodes": 7500, "desired_logit_prob": 0.95},
        },
    )


def feature_details(graph: AttributionGraph) -> dict[str, dict[str, object]]:
    """Details for every third feature of a graph."""
    out: dict[str, dict[str, object]] = {}
    for node in list(graph.nodes())[::3]:
        if node.kind == "feature":
            out[f"{node.layer}_{node.index}"] = {
                "label": f"years, number {node.index}",
                "top_logits": [[" 17", 2.5], ["18", 1.25]],
                "bottom_logits": [[" the", -1.5]],
                "de_embedding": [["1732", 3.0], [" year", 0.5]],
                "density": 0.0012,
                "max_activation": 2.0,
                "histogram": {"counts": [40, 0, 3, 0, 0, 0, 0, 0], "width": 0.75},
                "examples": [
                    {"tokens": ["The", " year", " 17", "45"], "activations": [0.0, 0.4, 2.0, 1.0]}
                ],
            }
    return out


@pytest.fixture
def make_graph() -> Callable[..., AttributionGraph]:
    """``build_graph``."""
    return build_graph


@pytest.fixture
def make_details() -> Callable[[AttributionGraph], dict[str, dict[str, object]]]:
    """``feature_details``."""
    return feature_details


def _first(*names: str) -> str:
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.skip(f"none of {', '.join(names)} is installed")
    return found[0]


class Page:
    """A browser with one page, and what the tests ask of it."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def open(self, text: str, address: str = "", size: tuple[int, int] = (1280, 800)) -> None:
        path = self.folder / "page.html"
        path.write_text(text, encoding="utf-8")
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + address)
        self.until(lambda: self.run("return document.documentElement.dataset.ready") == "true")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.one(selector).text)

    def ids(self) -> list[str]:
        script = "return [...document.querySelectorAll('#stage [data-id]')].map(e => e.dataset.id)"
        return list(self.run(script))

    def selected(self) -> str | None:
        found = self.all("#stage .selected")
        return found[0].get_attribute("data-id") if found else None

    def press(self, *pressed: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*pressed).perform()

    def slide(self, name: str, value: float) -> None:
        script = """
        const [slider, value, done] = arguments;
        slider.value = value;
        slider.dispatchEvent(new Event("input"));
        requestAnimationFrame(() => requestAnimationFrame(done));
        """
        self.driver.execute_async_script(script, self.one(f"#{name}-threshold"), value)

    def until(self, condition: Callable[[], Any], seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the page did not get there in time"
            time.sleep(0.02)

    def shot(self, name: str) -> None:
        """Keep a picture for people to look at."""
        time.sleep(0.2)  # the nodes fade
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [m["params"]["request"]["url"] for m in sent]


def start_browser() -> Any:
    """Headless Chromium; skips the test where it, its driver or selenium is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    options.binary_location = _first("chromium", "chromium-browser", "google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(
        options=options, service=service.Service(_first("chromedriver", "chromium.chromedriver"))
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser."""
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Page:
    """A page with empty logs."""
    browser.get_log("browser")
    browser.get_log("performance")
    return Page(browser, tmp_path)


@pytest.fixture
def page(open_page: Page) -> Iterator[Page]:
    """A page that must end without a console message and without a request to anywhere."""
    yield open_page
    assert open_page.complaints() == []
    inside = ("file:", "about:", "data:", "blob:")
    assert [url for url in open_page.requests() if not url.startswith(inside)] == []

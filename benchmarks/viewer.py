"""How long the graph page takes for what a reader does, at 1,000 nodes and 100,000 edges.

    python benchmarks/viewer.py [--edges 100000]

Opens a synthetic graph in headless Chromium (needs chromium, chromedriver and selenium, as the
tests marked ``browser`` do) and measures inside the page, without a graphics card. Times are
medians, in milliseconds, from the event to the end of script, style and layout; ``x frame`` is the
ratio to one frame at 60 Hz.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "viewer"))

from conftest import Page, build_graph, start_browser  # noqa: E402

from nnsight_transcoders.viewer.page import render_graph  # noqa: E402

FRAME = 1000 / 60

_TIMED = """
const [selector, kind, values] = arguments;
const targets = [...document.querySelectorAll(selector)];
return values.map((value, at) => {
  const target = targets[kind === "input" ? 0 : (at * 37) % targets.length];
  const box = target.getBoundingClientRect();
  const where = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  const start = performance.now();
  if (kind === "input") {
    target.value = value;
    target.dispatchEvent(new Event("input"));
  } else if (kind === "wheel") {
    target.dispatchEvent(new WheelEvent("wheel", { ...where, deltaY: value, cancelable: true }));
  } else {
    target.dispatchEvent(new PointerEvent(kind, where));
  }
  document.body.offsetHeight;
  return performance.now() - start;
});
"""

_SLIDE = """
const [selector, values, done] = arguments;
const slider = document.querySelector(selector);
const times = [];
const next = (at) => {
  if (at === values.length) return done(times);
  slider.value = values[at];
  const start = performance.now();
  slider.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => {
    document.body.offsetHeight;
    times.push(performance.now() - start);
    next(at + 1);
  });
};
next(0);
"""


def measure(page: Page, text: str) -> dict[str, list[float]]:
    """Times of what a reader does, in milliseconds."""
    page.open(text, "#n=1&e=1")
    run = page.run
    opened = run("return performance.getEntriesByType('navigation')[0].domComplete")
    shares = [0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 1.0]
    found: dict[str, list[Any]] = {"open the page": [opened]}
    found["hover a node"] = run(_TIMED, "#stage .node", "pointermove", [0] * 40)
    found["select a node"] = run(_TIMED, "#stage .node", "click", [0] * 40)
    found["zoom by a step"] = run(_TIMED, "#stage .floor", "wheel", [-60, 60] * 10)
    found["search"] = run(_TIMED, "#search", "input", ["L8", "L8 @9", "17", "feature", ""])
    page.driver.set_script_timeout(120)
    for name in ("node", "edge"):
        times = page.driver.execute_async_script(_SLIDE, f"#{name}-threshold", shares)
        found[f"move the {name} threshold"] = times
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=100_000)
    edges = parser.parse_args().edges
    text = render_graph(build_graph(n_features=750, n_edges=edges, n_layers=26), max_edges=edges)
    driver = start_browser()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Page(driver, Path(folder)), text)
    finally:
        driver.quit()
    print(f"{len(text) / 1e6:.1f} MB of page, {edges:,} edges")  # noqa: T201
    for name, times in found.items():
        middle = statistics.median(times)
        print(f"{name:26} {middle:8.1f} ms {middle / FRAME:8.2f} x frame")  # noqa: T201


if __name__ == "__main__":
    main()

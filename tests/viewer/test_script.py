"""The page's script: built from its sources, and its algorithms under node."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.viewer import page
from nnsight_transcoders.viewer.page import page_data

VIEWER = Path(page.__file__).parent
SOURCES = VIEWER / "src"
THRESHOLDS = [
    (0.8, 0.98),
    (0.5, 0.9),
    (0.95, 0.5),
    (1.0, 0.7),
    (0.3, 1.0),
    (1.0, 1.0),
    (0.05, 0.05),
]

MakeGraph = Callable[..., AttributionGraph]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def run_node(script: str, data: Any) -> Any:
    """Runs a module script that reads JSON from stdin and writes JSON to stdout."""
    head = 'import { readFileSync } from "node:fs"; const input = JSON.parse(readFileSync(0));\n'
    done = subprocess.run(
        ["node", "--input-type=module", "-e", head + script],
        input=json.dumps(data),
        capture_output=True,
        text=True,
        cwd=SOURCES,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_script_was_built_from_these_sources() -> None:
    digest = hashlib.sha256()
    names = sorted(p.name for p in SOURCES.iterdir() if re.search(r"\.(js|mjs|css|json)$", p.name))
    for name in names:
        digest.update(f"{name}\0".encode() + (SOURCES / name).read_bytes() + b"\0")
    for name in ("viewer.js", "dashboard.js"):
        first = (VIEWER / "assets" / name).read_text(encoding="utf-8").splitlines()[0]
        assert digest.hexdigest()[:16] in first, "run `npm ci && npm run build` in viewer/src"


@needs_node
def test_build_gives_the_committed_files(tmp_path: Path) -> None:
    if not (SOURCES / "node_modules" / "esbuild").is_dir():
        pytest.skip("esbuild is not installed (npm ci in viewer/src)")
    subprocess.run(["node", "build.mjs", f"--outdir={tmp_path}"], cwd=SOURCES, check=True)
    for name in ("viewer.js", "dashboard.js", "viewer.css", "LICENSES.txt"):
        assert (tmp_path / name).read_bytes() == (VIEWER / "assets" / name).read_bytes(), name


def test_script_writes_text_and_never_markup() -> None:
    for path in SOURCES.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        found = re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", source)
        assert not found, path.name
        assert len(source.splitlines()) <= 250, path.name


@needs_node
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_page_prunes_as_python_does(make_graph: MakeGraph, seed: int) -> None:
    graph = make_graph(n_features=120, n_edges=2500, n_layers=6, seed=seed)
    script = """
    import { readModel } from "./model.js";
    import { makeView } from "./view.js";
    const model = readModel(input.data);
    const out = input.thresholds.map(([node, edge]) => {
      const view = makeView(model, node, edge);
      return {
        nodes: view.nodes.map((i) => model.id[i]),
        edges: [Array.from(view.source), Array.from(view.target)],
        influence: view.nodes.map((i) => view.influence[i]),
        omitted: view.nodes.map((i) => view.omitted[i]),
        scores: [view.replacementScore, view.completenessScore],
      };
    });
    console.log(JSON.stringify(out));
    """
    thresholds = [pair for pair in THRESHOLDS if pair != (1.0, 1.0)]
    results = run_node(script, {"data": page_data(graph), "thresholds": thresholds})
    ids = [node.id for node in graph.nodes()]
    for (node, edge), result in zip(thresholds, results, strict=True):
        pruned = graph.prune(node, edge)
        names = [n.id for n in pruned.nodes()]
        assert result["nodes"] == names
        edges = [(ids[s], ids[t]) for s, t in zip(*result["edges"], strict=True)]
        expected = zip(pruned.source.tolist(), pruned.target.tolist(), strict=True)
        assert edges == [(names[s], names[t]) for s, t in expected]
        assert result["influence"] == pytest.approx(pruned.influence().tolist(), rel=1e-9)
        assert result["omitted"] == pytest.approx(pruned.omitted.tolist(), rel=1e-4, abs=1e-4)
        scores = [pruned.replacement_score, pruned.completeness_score]
        assert result["scores"] == pytest.approx(scores, rel=1e-9)


@needs_node
def test_masks_equal_at_every_threshold(make_graph: MakeGraph) -> None:
    graph = make_graph(n_features=60, n_edges=900, n_layers=5, seed=7)
    script = """
    import { readModel } from "./model.js";
    import { pruneMasks } from "./prune.js";
    const model = readModel(input.data);
    const count = (mask) => mask.reduce((sum, kept) => sum + kept, 0);
    const out = input.thresholds.map(([node, edge]) => {
      const { nodes, edges } = pruneMasks(model, node, edge);
      return [count(nodes), count(edges)];
    });
    console.log(JSON.stringify(out));
    """
    grid = [(n / 20, e / 20) for n in range(1, 21, 2) for e in (1, 7, 13, 19, 20)] + THRESHOLDS
    results = run_node(script, {"data": page_data(graph), "thresholds": grid})
    pruned = [graph.prune(*pair) for pair in grid]
    assert results == [[g.n_nodes, g.n_edges] for g in pruned]


@needs_node
def test_logits_without_probability_share_equally(make_graph: MakeGraph) -> None:
    graph = make_graph()
    graph = dataclasses.replace(graph, probability=torch.zeros(graph.n_nodes))
    script = """
    import { readModel } from "./model.js";
    import { makeView } from "./view.js";
    const model = readModel(input);
    console.log(JSON.stringify(makeView(model, 0.6, 0.9).nodes));
    """
    kept = run_node(script, page_data(graph))
    assert [graph.node(i).id for i in kept] == [n.id for n in graph.prune(0.6, 0.9).nodes()]


@needs_node
def test_state_survives_the_address(make_graph: MakeGraph) -> None:
    data = page_data(make_graph())
    ids = data["nodes"]["id"][:4]
    script = """
    import { readModel } from "./model.js";
    import { fromFile, fromHash, initialState, toFile, toHash } from "./state.js";
    const model = readModel(input.data);
    const start = { node: 0.8, edge: 0.98 };
    const state = {
      ...initialState(start), node: 0.55, selected: input.ids[0], theme: "dark", pinned: input.ids,
      groups: [{ name: 'a, "b" & <c>', ids: input.ids.slice(1, 3) }],
    };
    const broken = ["#n=7&e=x&s=none&p=,,none&g=[1]&g=[&theme=<b>", "#%", "#n=NaN&n=1"];
    console.log(JSON.stringify({
      same: fromHash("#" + toHash(state, start), start, model), state,
      file: {
        ...initialState(start), theme: "dark",
        ...fromFile(JSON.stringify(toFile(state)), start, model),
      },
      refused: ["", "[]", '{"pinnedIds": 3}'].map((text) => fromFile(text, start, model)),
      empty: toHash(initialState(start), start),
      broken: broken.map((hash) => fromHash(hash, start, model)), initial: initialState(start),
    }));
    """
    out = run_node(script, {"data": data, "ids": ids})
    assert out["same"] == out["file"] == out["state"]
    assert out["refused"] == [None] * 3
    assert out["empty"] == ""
    assert all(state == out["initial"] for state in out["broken"])


@needs_node
def test_group_edges_are_sums(make_graph: MakeGraph) -> None:
    graph = make_graph(n_features=30, n_edges=500)
    a = [n.id for n in graph.nodes() if n.kind == "feature" and n.layer == 0]
    b = [n.id for n in graph.nodes() if n.kind == "feature" and n.layer == 3]
    script = """
    import { readModel } from "./model.js";
    import { makeView } from "./view.js";
    import { makeUnits, unitEdges } from "./groups.js";
    const model = readModel(input.data);
    const groups = [{ name: "a", ids: input.a }, { name: "b", ids: input.b }];
    const units = makeUnits(model, { pinned: [...input.a, ...input.b], groups });
    console.log(JSON.stringify(unitEdges(makeView(model, 1, 1), units)));
    """
    (edge,) = run_node(script, {"data": page_data(graph), "a": a, "b": b})
    dense = graph.adjacency()
    ids = [node.id for node in graph.nodes()]
    rows, columns = [ids.index(i) for i in b], [ids.index(i) for i in a]
    assert (edge["from"], edge["to"]) == (0, 1)
    assert edge["weight"] == pytest.approx(float(dense[rows][:, columns].sum()), rel=1e-5)


@needs_node
def test_layout_keeps_nodes_in_their_cells(make_graph: MakeGraph) -> None:
    graph = make_graph(n_features=400, n_edges=3000, n_layers=8)
    script = """
    import { layout } from "./layout.js";
    import { readModel } from "./model.js";
    import { makeView } from "./view.js";
    const model = readModel(input);
    const plot = { width: 900, height: 600, columnLeast: model.tokens.map(() => 0) };
    const places = layout(model, makeView(model, 1, 1), plot, () => 60);
    const { x, y, columns, rows, width, height } = places;
    console.log(JSON.stringify({ x: [...x], y: [...y], columns, rows, width, height }));
    """
    out = run_node(script, page_data(graph))
    assert out["width"] >= 899.9
    places = set()
    for node in graph.nodes():
        x, y = out["x"][node.number], out["y"][node.number]
        places.add((round(x, 3), round(y, 3)))
        row = next(r for r in out["rows"] if r["layer"] == node.layer)
        assert row["y0"] <= y <= row["y1"]
        if node.kind != "logit":
            column = out["columns"][node.position]
            assert column["x0"] <= x <= column["x1"]
    assert len(places) == graph.n_nodes


@needs_node
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1235"),
        (-0.0123456, "\u22120.0123"),
        (12.345, "12.3"),
        (1.5e-7, "1.50e-7"),
        (2.5e6, "2.50e6"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    script = 'import { number } from "./text.js"; console.log(JSON.stringify(number(input)));'
    assert run_node(script, value) == text


@needs_node
def test_tokens_show_what_cannot_be_seen() -> None:
    script = 'import { tokenText } from "./text.js"; console.log(JSON.stringify(tokenText(input)));'
    shown = run_node(script, " a b\n\t\u202ec\u0000 ")
    assert shown == "\u00b7a b\u21b5\u21e5\\u202ec\\u0000\u00b7"

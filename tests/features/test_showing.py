"""Bundles in pages: dashboards, the graph page, notebooks, the command line."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nnsight_transcoders import FeatureBundle, TranscoderSet, attribute
from nnsight_transcoders.cli import app
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.viewer.server import Viewer

HOSTILE = "</script><script>alert(1)</script>"


def data_of(page: str) -> Any:
    (found,) = re.findall(r'id="(?:feature|graph)-data">(.*?)</script>', page, re.S)
    return json.loads(found)


def test_a_dashboard(bundle: FeatureBundle, tmp_path: Path) -> None:
    report = bundle[2, int(bundle.density(2).argmax())]
    page = report.to_html(tmp_path / "feature.html")
    assert (tmp_path / "feature.html").read_text() == page
    assert data_of(page)["features"] == [report.to_dict()]
    assert data_of(page)["title"] == report.title


def test_dashboards_of_the_most_active_or_of_chosen_features(
    bundle: FeatureBundle, tmp_path: Path
) -> None:
    data = data_of(bundle.to_html(tmp_path / "all.html", most=20))
    counts = [feature["n_active"] for feature in data["features"]]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 20
    data = data_of(bundle.to_html(features=[(1, 3), (2, 0)], title="Two"))
    assert [(f["layer"], f["index"]) for f in data["features"]] == [(1, 3), (2, 0)]
    with pytest.raises(InputError, match="layers 1, 2"):
        bundle.to_html(features=[(0, 3)])


def test_in_a_notebook_it_is_a_sandboxed_frame(bundle: FeatureBundle) -> None:
    bundle.labels[2, 4] = HOSTILE
    for shown in (bundle[2, 4], bundle):
        frame = shown._repr_html_()
        assert frame.startswith("<iframe srcdoc=")
        assert 'sandbox="allow-scripts allow-downloads"' in frame
        assert HOSTILE not in frame
        assert HOSTILE not in html.unescape(frame)


def test_the_graph_page_says_what_the_bundle_knows(
    model: Any, transcoders: TranscoderSet, bundle: FeatureBundle
) -> None:
    graph = attribute(model, transcoders, "The war lasted from 1732 to 17").prune()
    details = bundle.details(graph, n_examples=2)
    features = [node for node in graph.nodes() if node.kind == "feature" and node.layer in (1, 2)]
    assert details.keys() == {f"{node.layer}_{node.index}" for node in features}
    for node in features:
        report, shown = bundle[node.layer, node.index], details[f"{node.layer}_{node.index}"]
        assert shown["density"] == report.density
        assert len(shown["examples"]) == min(2, len(report.examples))
    assert data_of(graph.to_html(feature_details=details))["feature_details"] == json.loads(
        json.dumps(details)
    )


def test_the_server_shows_a_bundle(collected: Path, tmp_path: Path) -> None:
    shutil.copytree(collected, tmp_path / "features")
    server = Viewer(tmp_path)
    try:
        page = server.page("")
        assert page is not None
        assert b"features/</a> <small>features" in page
        shown = server.page("features/")
        assert shown is not None
        assert data_of(shown.decode())["features"]
    finally:
        server.server_close()


def test_the_command_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The war lasted from 1732 to 1745.\nFact: the capital of Texas is Austin.\n")
    arguments = ["features", str(text), str(tmp_path / "out"), "--layers", "1", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["layers"] == {"1": 768}
    assert FeatureBundle.open(data["bundle"]).layers == (1,)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "already holds a finished bundle" in again.output.replace("\n", " ")

"""Commands with ``--remote``: what they print and write is what they do of a model that is here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Loopback
from typer.testing import CliRunner

from nnsight_transcoders import AttributionGraph, FeatureBundle, TranscoderSet, feature_details
from nnsight_transcoders.cli import app

#: Runs a command; the JSON that it prints.
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: Any) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


def test_eval(run: Run, server: Loopback) -> None:
    arguments = ("eval", "--max-tokens", 200, "--layers", "1,2", "--no-each-layer")
    expected, found = run(*arguments), run(*arguments, "--remote", server.url)
    assert found["ce"] == pytest.approx(expected["ce"], rel=1e-5)
    for one, other in zip(found["layers"], expected["layers"], strict=True):
        assert (one["fvu"], one["l0"]) == pytest.approx((other["fvu"], other["l0"]), rel=1e-4)


def test_features(run: Run, server: Loopback) -> None:
    arguments = ("--max-tokens", 300, "--layers", "1")
    before = len(server.requests())
    run("features", "builtin", "there", *arguments, "--remote", server.url)
    # One per batch of texts, one for the norms, one for the lists of tokens.
    assert len(server.requests()) - before <= 4
    run("features", "builtin", "here", *arguments)
    found, expected = (FeatureBundle.open(folder) for folder in ("there", "here"))
    torch.testing.assert_close(found.density(1), expected.density(1))
    for feature in range(0, 768, 50):
        one, other = found[1, feature], expected[1, feature]
        for name in ("top_logits", "bottom_logits", "de_embedding"):
            assert [token for token, _ in getattr(one, name)] == [
                token for token, _ in getattr(other, name)
            ]


def test_a_page_has_its_tokens(run: Run, server: Loopback, local: Any) -> None:
    """What the page of a remote graph says of its features."""
    before = len(server.requests())
    answer = run("trace", "--max-nodes", 40, "--remote", server.url)
    assert len(server.requests()) == before + 3  # the graph; norms; lists
    chosen = TranscoderSet.from_pretrained("builtin/per-layer")
    graph = AttributionGraph.load(answer["graph_file"]).prune(0.8, 0.98)
    expected = feature_details(local, chosen, graph)
    page = Path(answer["page"]).read_text()
    data = page[page.index('id="graph-data"') :]
    data = json.loads(data[data.index(">") + 1 : data.index("</script>")])["feature_details"]
    assert set(data) == set(expected)
    for key, lists in expected.items():
        for name, tokens in lists.items():
            assert [one[0] for one in data[key][name]] == [one[0] for one in tokens]


def test_train(run: Run, server: Loopback, tmp_path: Path) -> None:
    settings = {"layers": [1], "n_tokens": 400, "d_transcoder": 32, "k": 4, "batch_size": 100}
    found = {}
    for name, remote in (("here", False), ("there", server.url)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(
            json.dumps(
                {
                    "model": "builtin",
                    "data": "builtin",
                    "out": name,
                    "remote": remote,
                    "buffer_size": 200,
                    **settings,
                }
            )
        )
        run("train", file)
        found[name] = TranscoderSet.from_pretrained(str(tmp_path / name))[1].W_enc
    torch.testing.assert_close(found["there"], found["here"], rtol=1e-4, atol=1e-5)

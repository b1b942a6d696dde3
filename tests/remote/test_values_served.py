"""What a remote model is asked for: site values, per-head contributions, products with its weights,
and how well a set fits it. The server has not this package, the client has not the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from nnsight_transcoders import (
    BlindStudy,
    CircuitRun,
    TranscoderSet,
    attach,
    de_embed,
    feature_summary,
    global_weights,
    logits_of,
    path_graph,
    pull_back,
    push_forward,
    qk_attribution,
    read_vectors,
    strongest_connections,
    top_connections,
    top_paths,
    verify,
    virtual_weights,
    write_vectors,
)
from nnsight_transcoders.cli import app
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote import calls
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.site_stream import read_features, site_values, stream_site_values

PROMPT = "The war lasted from 1732 to 17"
TEXTS = ["The war lasted from 1732 to 17", "She opened the letter slowly"]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-4, relative to the whole."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.fixture
def here(local: Any, model: Any) -> Any:
    """The model with its weights; and a check that nobody needed them on the client."""
    yield local
    assert not model.dispatched


def ids_of(model: Any) -> Tensor:
    return torch.tensor([model.tokenizer(PROMPT)["input_ids"]])


# -- values --------------------------------------------------------------------------------------


def test_features_are_computed_on_the_client(server, model, here, transcoders):
    found = read_features(model, transcoders, PROMPT, [1, 3], remote=server.url)
    sent = server.requests()[-1]
    watched = attach(here, transcoders, mode="observe")
    with torch.no_grad(), watched.trace(PROMPT):
        expected = nnsight.save([])
        for layer in (1, 3):
            expected.append(watched.transcoders[layer].features.output[0])
    assert list(found) == [1, 3]
    for one, other in zip(found.values(), expected, strict=True):
        assert_close(one.float(), other.float())
        assert 0 < int(one.count_nonzero()) < one.numel() // 4
    assert sent < 20_000  # nothing of the set went up


def test_only_what_is_asked_for_comes_back(server, model, here):
    ids = ids_of(model).repeat(2, 1)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    kept[0, 2:5] = kept[1, -1] = True
    wanted = [(2, "O"), (0, "N1"), (2, "N0")]
    settings = RemoteServer(host=server.url, dtype="bfloat16")
    found = site_values(model, wanted, ids, kept, remote=settings)
    expected = site_values(here, wanted, ids, kept)
    assert list(found) == list(expected) == [(0, "N1"), (2, "N0"), (2, "O")]
    for where, value in found.items():
        assert value.shape == (4, 128)
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[where].bfloat16())


def test_a_stream_goes_on_when_the_server_forgets(own_server, model, here, monkeypatch):
    """Requests that were under way when the server was restarted are sent again."""
    monkeypatch.setattr(calls, "UNKNOWN_AFTER", 0.2)
    batches = [ids_of(model)[:, :n] for n in (9, 5, 7, 4)]
    wanted = [(1, "N1"), (1, "O")]
    stream = stream_site_values(model, wanted, batches, remote=own_server.url)
    found = [next(stream)]
    own_server.kill()
    for answer in Path(own_server.state).iterdir():
        answer.unlink()
    own_server.start()
    found += stream
    expected = list(stream_site_values(here, wanted, batches))
    assert [value[1, "O"].shape[1] for value in found] == [9, 5, 7, 4]
    for one, other in zip(found, expected, strict=True):
        for where, value in one.items():
            assert_close(value, other[where])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [([(9, "N1")], "layers 0 to 3, not 9"), ([(0, "N2")], "unknown site 'N2'; known: R, N0")],
)
def test_values_that_there_are_not(wanted, message, server, model):
    before = len(server.requests())
    with pytest.raises(InputError, match=message):
        site_values(model, wanted, ids_of(model), remote=server.url)
    assert len(server.requests()) == before


# -- contributions -------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "requests"), [(None, 1), ("server", 2)])
def test_contributions_of_every_head(weights, requests, server, model, here, transcoders):
    """With the checkpoint at hand, or with the server asked for each target's."""
    before = len(server.requests())
    found = CircuitRun.collect(model, transcoders, PROMPT, remote=server.url, weights=weights)
    assert len(server.requests()) - before == 1
    expected = CircuitRun.collect(here, transcoders, PROMPT)
    assert found.remote
    assert not expected.remote
    for name in ("token", "feature"):
        target, same = (
            run.token(40) if name == "token" else feature(run, 3) for run in (found, expected)
        )
        before = len(server.requests())
        there, ours = found.contributions(target), expected.contributions(same)
        assert found.contributions(target) == there  # asked for once
        assert len(server.requests()) - before == requests - 1
        assert [str(c) for c in there] == [str(c) for c in ours]
        assert {"attention", "feature", "error", "token"} <= {c.kind for c in there}
        values = [torch.tensor([c.value for c in both]) for both in (there, ours)]
        assert_close(*values)
        assert float(values[0].sum()) == pytest.approx(found.total(target), rel=1e-4)


def feature(run: CircuitRun, layer: int) -> Any:
    """The strongest feature of a layer at the last position, as a target."""
    active = run.active.layers[layer]
    last = (active.position == run.run.n_positions - 1).nonzero().flatten()
    row = last[active.activation[last].argmax()]
    return run.feature(layer, int(active.index[row]))


def test_paths(server, model, here, per_layer):
    """A round takes a request for its contributions and one for the heads that are followed; the
    attention maps, 2 D^2 numbers a layer, stay on the server until a graph is made."""
    found = CircuitRun.collect(model, per_layer, PROMPT, remote=server.url, weights="server")
    expected = CircuitRun.collect(here, per_layer, PROMPT)
    targets = [run.token(40) for run in (found, expected)]
    before = len(server.requests())
    paths = [
        top_paths(run, target, depth=3)
        for run, target in zip((found, expected), targets, strict=True)
    ]
    assert len(server.requests()) - before == 5
    assert [str(path) for path in paths[0]] == [str(path) for path in paths[1]]
    assert_close(*(torch.tensor([path.value for path in some]) for some in paths))
    graphs = [
        path_graph(run, target, some)
        for run, target, some in zip((found, expected), targets, paths, strict=True)
    ]
    assert len(server.requests()) - before == 6
    assert_close(graphs[0].adjacency(), graphs[1].adjacency())
    assert graphs[0].completeness_error < 1e-4


def test_a_direction_as_the_target(server, model, here, per_layer):
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0))
    found = CircuitRun.collect(model, per_layer, PROMPT, remote=server.url)
    expected = CircuitRun.collect(here, per_layer, PROMPT)
    totals = [run.total(run.token(("mine", direction))) for run in (found, expected)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


@pytest.mark.parametrize(("weights", "requests"), [(None, 1), ("server", 2)])
def test_scores_are_taken_apart(weights, requests, server, model, here, transcoders):
    """One request for what the attention is called with, and one for a head's rows of the query
    and key maps, unless the client can read them; the same head again asks for nothing."""
    there = CircuitRun.collect(model, transcoders, PROMPT, remote=server.url, weights=weights)
    expected = CircuitRun.collect(here, transcoders, PROMPT)
    before = len(server.requests())
    for position in (2, 0):
        found = qk_attribution(there, 1, 3, position)
        ours = qk_attribution(expected, 1, 3, position)
        assert (found.destinations, found.sources) == (ours.destinations, ours.sources)
        assert_close(found.terms, ours.terms)
        assert found.score == pytest.approx(ours.score, rel=1e-4)
        assert float(found.terms.sum()) == pytest.approx(found.score, rel=1e-3)
        sent = server.requests()[before:]
        assert len(sent) == requests
        assert max(sent) < 30_000  # no vector goes up


# -- virtual weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("head", [0, 3, None])
def test_vectors_through_heads(head, server, model, here):
    vectors = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    for move in (pull_back, push_forward):
        before = len(server.requests())
        found = move(model, vectors, 1, head, remote=server.url)
        assert len(server.requests()) == before + 1
        assert_close(found, move(here, vectors, 1, head))


@pytest.mark.parametrize("head", [None, (2, 1), (2, None)])
def test_virtual_weights(head, server, model, here, transcoders):
    ends = {"source": (0, [1, 2, 3]), "target": (3, [5, 6]), "head": head}
    found = virtual_weights(model, transcoders, **ends, remote=server.url)
    assert_close(found, virtual_weights(here, transcoders, **ends))


def test_the_vocabulary(server, model, here, transcoders):
    read = read_vectors(model, transcoders, 2, [1, 2, 3], remote=server.url)
    written = write_vectors(model, transcoders, 0, [1, 2, 3], remote=server.url)
    assert_close(read, read_vectors(here, transcoders, 2, [1, 2, 3]))
    assert_close(written, write_vectors(here, transcoders, 0, [1, 2, 3]))
    assert_close(de_embed(model, read, remote=server.url), de_embed(here, read))
    assert_close(logits_of(model, written, remote=server.url), logits_of(here, written))


def test_vectors_of_another_width_are_not_sent(server, model):
    before = len(server.requests())
    with pytest.raises(InputError, match=r"shape \(n, 128\), got \(2, 5\)"):
        pull_back(model, torch.ones(2, 5), 1, 0, remote=server.url)
    with pytest.raises(InputError, match="heads 0 to 3, not 9"):
        pull_back(model, torch.ones(2, 128), 1, 9, remote=server.url)
    assert len(server.requests()) == before


# -- verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [512 * 2**20, 2**20], ids=["set travels", "set stays"])
def test_verify(max_bytes, server, model, here, transcoders):
    settings = RemoteServer(host=server.url, max_bytes=max_bytes)
    before = len(server.requests())
    found = verify(model, transcoders, TEXTS, remote=settings)
    sent = server.requests()[before:]
    expected = verify(here, transcoders, TEXTS)
    assert found.n_tokens == expected.n_tokens
    assert [found.ce, found.ce_replaced] == pytest.approx(
        [expected.ce, expected.ce_replaced], rel=1e-3
    )
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.fvu, one.l0) == pytest.approx((other.fvu, other.l0), rel=1e-3)
        assert one.verdict == other.verdict
        if other.ce_change is None:
            assert one.ce_change is None
        else:
            assert one.ce_change == pytest.approx(other.ce_change, abs=1e-3)
    # Two texts of different lengths are two batches: values; single layers; all of them at once.
    singles = 0 if transcoders.cross_layer else 1
    assert len(sent) == 2 * (1 + singles + (1 if max_bytes > 2**23 else 5))
    assert (max(sent) > 500_000) == (max_bytes > 2**23)


def test_a_set_that_does_not_fit_is_explained(server, model, here):
    """Read at the residual stream instead of behind the norm."""
    chosen = TranscoderSet.from_pretrained("builtin/per-layer", dtype=torch.float32)
    moved = {}
    for layer in (1, 2):
        moved[layer] = chosen[layer]
        moved[layer].config = moved[layer].config.replace(input_site="R")
    wrong = TranscoderSet.from_transcoders(moved)
    found = verify(model, wrong, TEXTS, remote=server.url)
    expected = verify(here, wrong, TEXTS)
    assert not found.ok
    assert [layer.hypothesis for layer in found.layers] == [
        layer.hypothesis for layer in expected.layers
    ]
    assert any("N1" in str(layer.hypothesis) for layer in found.layers)


def test_verify_on_the_command_line(server):
    arguments = ["verify", "--transcoders", "builtin/skip", "--json"]
    answers = [
        json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout)
        for more in ([], ["--remote", server.url])
    ]
    assert answers[0]["ok"]
    assert answers[1]["ce_replaced"] == pytest.approx(answers[0]["ce_replaced"], rel=1e-3)


@pytest.mark.parametrize("head", [None, (2, 1), (2, None)])
def test_connections(head, server, model, here, transcoders):
    """A head's maps come back once; the set's rows are multiplied here."""
    before = len(server.requests())
    for direction, layer in (("up", 0), ("down", 3)):
        options = {"direction": direction, "head": head, "k": 7}
        found = top_connections(model, transcoders, layer, 5, **options, remote=server.url)
        expected = top_connections(here, transcoders, layer, 5, **options)
        assert [str(one) for one in found] == [str(one) for one in expected]
    assert len(server.requests()) - before <= 4
    options = {"sources": [0], "targets": [3], "head": head, "k": 9}
    found = strongest_connections(model, transcoders, **options, remote=server.url)
    expected = strongest_connections(here, transcoders, **options)
    assert_close(*(torch.tensor([one.weight for one in some]) for some in (found, expected)))


def test_global_weights(server, model, here, transcoders):
    arguments = (transcoders, TEXTS, [(0, i) for i in range(40)], [(3, j) for j in range(40)])
    before = len(server.requests())
    found = global_weights(model, *arguments, remote=server.url)
    assert len(server.requests()) - before == 1 + len(TEXTS)  # the norms, and a run each
    expected = global_weights(here, *arguments)
    assert found.n_positions == expected.n_positions
    assert float(expected.mean.abs().max()) > 0
    for name in ("source_rate", "virtual", "mean", "conditional_mean", "twera"):
        assert_close(getattr(found, name), getattr(expected, name))


def test_summaries_and_studies_of_a_feature(server, model, here, per_layer):
    said = []
    for run, where in ((model, {"remote": server.url}), (here, {})):
        circuit = CircuitRun.collect(run, per_layer, PROMPT, **where)
        last = circuit.active.layers[2]
        index = int(last.index[last.position == circuit.run.n_positions - 1][0])
        found = feature_summary(run, per_layer, 2, index, circuit=circuit, depth=2, **where)
        study = BlindStudy(run, per_layer, TEXTS, 2, index, **where)
        lists = (*study.logit_effects(), study.de_embedding())
        paths = [[str(step) for step in path.steps] for path in found.paths]
        said.append((paths, [[token for token, _ in some] for some in lists]))
        assert found.top_logits == lists[0]
    assert said[0] == said[1]

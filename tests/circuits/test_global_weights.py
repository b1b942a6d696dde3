"""Streamed global weights against the dense computation and against contributions, and resuming."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from setups import model, transcoders
from torch import Tensor

from nnsight_transcoders.circuits import global_weights as module
from nnsight_transcoders.circuits.contributions import CircuitRun
from nnsight_transcoders.circuits.global_weights import GlobalWeights, global_weights
from nnsight_transcoders.circuits.invariant import InvariantModel
from nnsight_transcoders.circuits.virtual_weights import virtual_weights
from nnsight_transcoders.errors import CheckpointError, InputError, MismatchError

CORPUS: list[Any] = [
    [1, 40, 7, 23, 7],
    [9, 9, 50, 3, 80, 12, 33, 4],
    torch.tensor([5, 6, 7, 8]),
    "w3 w40 w96 w17",
    [60, 61],
    [2, 90, 13, 14, 15, 77],
]
SOURCES = [(0, i) for i in (3, 0, 11, 20)] + [(1, i) for i in (5, 2, 17)]
TARGETS = [(2, j) for j in (1, 8, 23)] + [(1, j) for j in (4, 5, 12)]


@cache
def runs(name: str, kind: str, **config: Any) -> list[CircuitRun]:
    chosen = transcoders(name, kind, **config)
    return [CircuitRun.collect(model(name), chosen, prompt) for prompt in CORPUS]


def activations(run: CircuitRun, features: list[tuple[int, int]]) -> Tensor:
    """``(T, n)`` from the run's active features."""
    dense = torch.zeros(run.run.n_positions, len(features), dtype=torch.float64)
    for column, (layer, feature) in enumerate(features):
        active = run.active.layers[layer]
        rows = active.index == feature
        dense[active.position[rows], column] = active.activation[rows].double()
    return dense


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox"])
def test_equals_the_dense_computation(name: str, kind: str) -> None:
    nn_model, chosen = model(name), transcoders(name, kind)
    found = global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS)
    a_i = torch.cat([activations(run, SOURCES) for run in runs(name, kind)])
    a_j = torch.cat([activations(run, TARGETS) for run in runs(name, kind)])
    assert found.n_positions == len(a_i) == 29
    assert found.n_prompts == 6
    virtual = torch.zeros(len(SOURCES), len(TARGETS), dtype=torch.float64)
    for i, (source, f) in enumerate(SOURCES):
        for j, (target, g) in enumerate(TARGETS):
            if source < target:
                weight = virtual_weights(nn_model, chosen, (source, [f]), (target, [g]))
                virtual[i, j] = float(weight)
    torch.testing.assert_close(found.virtual, virtual, rtol=1e-5, atol=1e-6)
    mean_j = a_j.mean(0)
    twera = (a_i.T @ a_j / len(a_i)) / mean_j.masked_fill(mean_j == 0, 1) * virtual
    torch.testing.assert_close(found.twera, twera, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.source_rate, (a_i > 0).double().mean(0))
    torch.testing.assert_close(found.target_rate, (a_j > 0).double().mean(0))


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize(
    ("name", "input_site", "output_site"),
    [("gpt2", "N1", "O"), ("gemma2", "N1", "O"), ("gemma2", "N0", "O'"), ("gpt-neox", "R", "O")],
)
def test_input_gradient_is_the_mean_contribution(
    name: str, kind: str, input_site: str, output_site: str
) -> None:
    """Where a target is active, its contributions are what is averaged, denominators and all."""
    config = {"input_site": input_site, "output_site": output_site}
    found = global_weights(model(name), transcoders(name, kind, **config), CORPUS, SOURCES, TARGETS)
    sums = torch.zeros(len(SOURCES), len(TARGETS), dtype=torch.float64)
    for run in runs(name, kind, **config):
        for j, (layer, feature) in enumerate(TARGETS):
            active = run.active.layers[layer]
            for position in active.position[active.index == feature].tolist():
                target = run.feature(layer, feature, position)
                for c in run.contributions(target):
                    if c.kind == "feature" and (c.layer, c.index) in SOURCES:
                        sums[SOURCES.index((c.layer, c.index)), j] += c.value
    counts = found.target_rate * found.n_positions
    expected = sums / counts.clamp_min(1)
    assert int((expected != 0).sum()) > 5
    torch.testing.assert_close(found.conditional_mean, expected, rtol=1e-3, atol=1e-6)


def test_mean_over_all_positions() -> None:
    """Llama's denominators by hand."""
    nn_model, chosen = model("llama"), transcoders("llama", "per-layer")
    found = global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS)
    total = torch.zeros(len(SOURCES), len(TARGETS), dtype=torch.float64)
    for run in runs("llama", "per-layer"):
        scale = torch.stack(
            [run.run.mid[layer].double().pow(2).mean(1).add(1e-6).rsqrt() for layer, _ in TARGETS],
            1,
        )
        total += activations(run, SOURCES).T @ scale
    expected = total / found.n_positions * found.virtual
    torch.testing.assert_close(found.mean, expected, rtol=1e-4, atol=1e-7)


def same(one: GlobalWeights, other: GlobalWeights) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(GlobalWeights)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
def test_resuming_gives_the_same_numbers(kind: str, tmp_path: Path) -> None:
    nn_model, chosen, state = model("gemma2"), transcoders("gemma2", kind), tmp_path / "s" / "sums"
    whole = global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS)

    def breaks() -> Any:
        yield from CORPUS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        global_weights(nn_model, chosen, breaks(), SOURCES, TARGETS, state=state, save_every=2)
    runs_made = []
    run = InvariantModel.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InvariantModel, "run", lambda *a: (runs_made.append(1), run(*a))[1])
        again = global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS, state=state)
    assert len(runs_made) == 2  # four of six had been saved
    assert same(again, whole)
    assert same(global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS, state=state), whole)
    assert [path.name for path in state.parent.iterdir()] == ["sums"]


def test_a_state_goes_with_its_features_set_and_corpus(tmp_path: Path) -> None:
    nn_model, chosen, state = model("llama"), transcoders("llama", "per-layer"), tmp_path / "sums"
    global_weights(nn_model, chosen, CORPUS[:2], SOURCES, TARGETS, state=state)
    before = state.read_bytes()
    with pytest.raises(MismatchError, match="other features"):
        global_weights(nn_model, chosen, CORPUS, SOURCES[::-1], TARGETS, state=state)
    other = transcoders("llama", "per-layer", input_site="R")
    with pytest.raises(MismatchError, match="another transcoder set"):
        global_weights(nn_model, other, CORPUS, SOURCES, TARGETS, state=state)
    for corpus in (CORPUS[1:], CORPUS[:1], []):
        with pytest.raises(MismatchError, match="first 2 prompts"):
            global_weights(nn_model, chosen, corpus, SOURCES, TARGETS, state=state)
    assert state.read_bytes() == before
    for content in (b"", before[:200], b"{}" * 50):
        state.write_bytes(content)
        with pytest.raises(CheckpointError, match="no state"):
            global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS, state=state)


def test_leading_positions_are_left_out() -> None:
    chosen = transcoders("gpt2", "per-layer", leading_positions=1)
    found = global_weights(model("gpt2"), chosen, CORPUS, SOURCES, TARGETS)
    assert found.n_positions == 29 - 6


def test_features_chosen_jointly() -> None:
    config = {"activation": "jointtopk", "k": 9}
    nn_model, chosen = model("llama"), transcoders("llama", "cross-layer", **config)
    found = global_weights(nn_model, chosen, CORPUS[:2], SOURCES, TARGETS)
    circuits = runs("llama", "cross-layer", **config)[:2]
    rates = torch.cat([activations(run, SOURCES) > 0 for run in circuits]).double().mean(0)
    torch.testing.assert_close(found.source_rate, rates)


def test_prompts_are_cut_and_pairs_ranked() -> None:
    nn_model, chosen = model("llama"), transcoders("llama", "per-layer")
    found = global_weights(nn_model, chosen, CORPUS, SOURCES, TARGETS, max_tokens=2)
    assert found.n_positions == 12
    ranked = found.top(4, by="virtual")
    values = found.virtual.abs().flatten().sort(descending=True).values[:4]
    assert [abs(value) for *_, value in ranked] == pytest.approx(values.tolist())
    source, target, value = ranked[0]
    assert float(found.virtual[SOURCES.index(source), TARGETS.index(target)]) == value


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    nn_model, chosen = model("llama"), transcoders("llama", "per-layer")

    def call(corpus: Any = CORPUS, sources: Any = SOURCES, targets: Any = TARGETS, **more: Any):
        return global_weights(nn_model, chosen, corpus, sources, targets, **more)

    for more, message in [
        ({"corpus": []}, "corpus is empty"),
        ({"sources": [(2, 0)]}, "no target"),
        ({"sources": []}, "at least one"),
        ({"sources": [(0, 24)]}, "features 0 to 23"),
        ({"targets": [(9, 0)]}, "has layers"),
        ({"save_every": 0}, "save_every"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"corpus": [[]]}, "empty"),
    ]:
        with pytest.raises(InputError, match=message):
            call(**more)
    found = call(corpus=CORPUS[:1])
    with pytest.raises(InputError, match="twera"):
        found.top(by="n_prompts")
    monkeypatch.setattr(module, "MAX_PAIRS", 10)
    with pytest.raises(InputError, match="several passes"):
        call()

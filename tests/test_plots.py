"""Figures hold the numbers that they are given."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from attach_support import model, transcoders

pytest.importorskip("plotly")

from nnsight_transcoders import (
    CircuitRun,
    attribute,
    logit_effects,
    plot_attention,
    plot_completeness,
    plot_effects,
    plot_logit_effects,
    plot_pareto,
    top_paths,
)
from nnsight_transcoders.circuits.by_layer import completeness_by_layer
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.evaluation.pareto_table import Bounds, ParetoPoint, ParetoTable

PROMPT = "w5 w9 w33 w12 w50"


@cache
def graph(kind: str = "per-layer") -> Any:
    return attribute(model("llama"), transcoders("llama", kind), PROMPT)


@cache
def circuit() -> CircuitRun:
    return CircuitRun.collect(model("llama"), transcoders("llama"), PROMPT)


def point(kind: str, layer: int, k: int, l0: float, ce: float) -> ParetoPoint:
    return ParetoPoint(kind, layer, {"k": k}, l0, ce, 0.1, 0.01, 0.9, 3)


TABLE = ParetoTable(
    "model",
    1234,
    {"seed": 0},
    {0: Bounds(3.0, 5.0, 6.0), 2: Bounds(3.0, 4.0, 4.5)},
    (
        point("transcoder", 0, 4, 4.0, 3.4),
        point("transcoder", 0, 8, 8.0, 3.5),
        point("transcoder", 0, 16, 16.0, 3.2),
        point("SAE", 0, 4, 4.5, 3.6),
        point("SAE", 0, 16, 15.0, 3.3),
        point("transcoder", 2, 4, 4.0, 3.1),
        point("SAE", 2, 4, 4.0, 3.05),
    ),
)


# -- Pareto --------------------------------------------------------------------------------------


def test_the_pareto_figure_has_the_curves_and_the_bounds():
    figure = plot_pareto(TABLE, layer=0)
    curves = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert list(curves) == ["transcoder", "SAE"]
    assert list(zip(curves["transcoder"].x, curves["transcoder"].y, strict=True)) == [
        (4.0, 3.4),
        (16.0, 3.2),
    ]
    assert list(curves["SAE"].y) == [3.6, 3.3]
    assert curves["transcoder"].text[1] == "k=16: CE 3.2000"
    (beaten,) = [trace for trace in figure.data if trace.mode == "markers"]
    assert (list(beaten.x), list(beaten.y)) == ([8.0], [3.5])
    assert beaten.marker.color == curves["transcoder"].line.color != curves["SAE"].line.color
    bounds = {trace.name: trace for trace in figure.data if trace.mode == "lines"}
    assert {name: list(trace.y) for name, trace in bounds.items()} == {
        "mean-ablated MLP": [5.0, 5.0],
        "original model": [3.0, 3.0],
    }
    assert list(bounds["original model"].x) == [4.0, 16.0]
    assert figure.layout.xaxis.type == "log"
    assert "1,234" in figure.layout.title.text


def test_the_rise_on_a_logarithmic_axis():
    lossless = replace(TABLE, points=(*TABLE.points, point("SAE", 0, 32, 32.0, 2.99)))
    figure = plot_pareto(lossless, 0, log=True)
    curves = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert list(curves["transcoder"].y) == pytest.approx([0.4, 0.2])
    assert curves["SAE"].y[-1] == 1e-5
    assert [list(trace.y) for trace in figure.data if trace.mode == "lines"] == [[2.0, 2.0]]
    assert figure.layout.yaxis.type == "log"
    assert "3.000" in figure.layout.title.text


def test_a_pareto_figure_of_one_of_several_layers():
    for layer in (None, 1):
        with pytest.raises(InputError, match=r"layers \[0, 2\]: choose one"):
            plot_pareto(TABLE, layer)
    assert "Layer 2" in plot_pareto(TABLE, 2).layout.title.text


# -- completeness --------------------------------------------------------------------------------


def test_completeness_by_layer_adds_up_to_the_graphs_score():
    one = graph()
    layers = completeness_by_layer(one)
    assert sorted(layers)[-1] == zoo.N_LAYERS
    reach = one.influence() + one.logit_weights()
    targets = (one.kind == 0) | (one.kind == 3)
    complete = 0.0
    for shares in layers.values():
        assert shares["features"] + shares["tokens"] + shares["errors"] == pytest.approx(1)
        complete += (1 - shares["errors"]) * shares["weight"] * float(reach[targets].sum())
    assert sum(shares["weight"] for shares in layers.values()) == pytest.approx(1)
    whole = (complete + float(reach[~targets].sum())) / float(reach.sum())
    assert whole == pytest.approx(one.completeness_score)


def test_completeness_by_layer_by_hand():
    one = graph()
    for layer, shares in completeness_by_layer(one).items():
        flow, weight = 0.0, 0.0
        influence = one.influence() + one.logit_weights()
        for node in one.nodes():
            if node.kind in ("feature", "logit") and node.layer == layer:
                edges = one.edges_into(node.number)
                total = sum(abs(size) for _, size in edges)
                wrong = sum(abs(size) for source, size in edges if source.kind == "error")
                flow += float(influence[node.number]) * wrong / total
                weight += float(influence[node.number])
        assert shares["errors"] == pytest.approx(flow / weight, rel=1e-5)


def test_the_completeness_figure_has_a_bar_per_layer_and_graph():
    figure = plot_completeness({"PLT": graph(), "CLT": graph("cross-layer")})
    assert [trace.name for trace in figure.data] == ["PLT", "CLT"]
    layers = completeness_by_layer(graph())
    assert list(figure.data[0].y) == [1 - one["errors"] for one in layers.values()]
    assert figure.data[0].x[-1] == "logits"
    assert figure.data[0].x[0] == f"layer {min(layers)}"
    assert len(plot_completeness(graph()).data) == 1
    with pytest.raises(InputError, match="no graph"):
        plot_completeness({})


# -- effects -------------------------------------------------------------------------------------


def test_the_effects_figure_has_the_points_the_line_and_the_two_figures():
    figure = plot_effects([1.0, -2.0, 3.0], torch.tensor([0.5, 1.0, 4.0]), labels=["a", "b", "c"])
    line, points = figure.data
    assert (list(points.x), list(points.y)) == ([1.0, -2.0, 3.0], [0.5, 1.0, 4.0])
    assert list(points.text) == ["a", "b", "c"]
    assert list(line.x) == list(line.y) == [-2.0, 4.0]
    assert figure.layout.title.text == "3 effects: sign agreement 67%, Spearman 0.50"


def test_effects_that_do_not_match():
    unequal = (([], [], None), ([1], [1, 2], None), ([1], [1], ["a", "b"]))
    for predicted, measured, labels in unequal:
        with pytest.raises(InputError, match="as many of each"):
            plot_effects(predicted, measured, labels=labels)
    with pytest.raises(InputError, match="measured effects as well"):
        plot_effects([1.0])


def test_a_table_of_effects():
    from nnsight_transcoders import predicted_vs_measured

    table = predicted_vs_measured(
        graph(), model("llama"), transcoders("llama"), nodes=graph().of_kind("feature")[:5].tolist()
    )
    points = plot_effects(table).data[1]
    assert list(points.x) == table.predicted.tolist()
    assert list(points.y) == table.measured.tolist()
    assert list(points.text) == list(table.labels)


# -- logit effects -------------------------------------------------------------------------------


def test_the_bars_are_the_strongest_logit_effects_at_either_end():
    figure = plot_logit_effects(model("llama"), transcoders("llama"), 1, 7, top=4)
    (bars,) = figure.data
    effects = logit_effects(model("llama"), transcoders("llama"), 1, [7])[0]
    ordered = effects.sort().values
    assert list(bars.x) == [*ordered[:4].tolist(), *ordered[-4:].tolist()]
    best = f"'w{int(effects.argmax())}'"
    assert bars.text[-1] == figure.layout.yaxis.ticktext[-1] == best
    colours = dict(zip([value > 0 for value in bars.x], bars.marker.color, strict=True))
    assert len(set(colours.values())) == len(colours)
    everything = plot_logit_effects(model("llama"), transcoders("llama"), 1, 7, top=1000)
    assert len(everything.data[0].x) == zoo.VOCAB
    with pytest.raises(InputError, match="top must be"):
        plot_logit_effects(model("llama"), transcoders("llama"), 1, 7, top=0)


# -- attention -----------------------------------------------------------------------------------


def test_the_attention_figure_has_the_patterns_of_the_paths_heads_and_marks_its_steps():
    target = circuit().token(20, position=-1)
    paths = top_paths(circuit(), target, depth=4, per_node=20, beam=400)
    heads = [[step for step in path.steps if step.kind == "attention"] for path in paths]
    path = next(p for p, some in zip(paths, heads, strict=True) if len(some) > 1)
    figure = plot_attention(circuit(), target, path)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    marks = [trace for trace in figure.data if trace.type == "scatter"]
    names = [f"{i} {text!r}" for i, text in enumerate(circuit().token_texts)]
    at, number = target.position, 0
    for step in path.steps:
        if step.kind == "attention":
            pattern = circuit().run.pattern[step.layer][step.index]
            found = torch.tensor(maps[number].z)
            assert torch.allclose(found.float(), pattern, atol=1e-6)
            assert (marks[number].x[0], marks[number].y[0]) == (names[step.position], names[at])
            title = figure.layout.annotations[number].text
            assert title == f"layer {step.layer}, head {step.index}"
            number += 1
        at = step.position
    assert number == len(maps) == len(marks)
    assert math.isclose(sum(maps[0].z[-1]), 1, abs_tol=1e-5)
    short = next(p for p in paths if [step.kind for step in p.steps] == ["token"])
    with pytest.raises(InputError, match="no attention head"):
        plot_attention(circuit(), target, short)


# -- without plotly ------------------------------------------------------------------------------


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"nnsight-transcoders\[viz\]"):
        plot_pareto(TABLE, 0)

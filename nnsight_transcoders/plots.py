"""Figures: one function each, which returns a plotly figure (``pip install
'nnsight-transcoders[viz]'``).

``figure.show()`` displays it, ``figure.write_html("it.html")`` writes an interactive page;
``figure.write_image("it.svg")`` needs the package kaleido and a Chrome or Chromium.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from torch import Tensor

    from .circuits.contributions import CircuitRun
    from .circuits.effects import EffectTable
    from .circuits.feature_vectors import FeatureVector
    from .circuits.graph import AttributionGraph
    from .circuits.paths import Path
    from .evaluation.pareto_table import ParetoTable
    from .remote.server import Remote
    from .sets import TranscoderSet
    from .sites import Sites

#: Colours that stay apart for readers who see few (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#777777"
#: Where a rise of nothing stands on a logarithmic axis, in nats.
_LEAST = 1e-5


def plot_pareto(table: ParetoTable, layer: int | None = None, *, log: bool = False) -> Figure:
    """The paper's figure: cross-entropy against L0, one curve per kind, between its bounds.

    A curve goes through the points that no other of its kind beats; those are open circles.

    Args:
        table: What ``pareto`` found.
        layer: Which layer (default: the only one).
        log: Draw the rise over the original model on a logarithmic axis, for curves that lie close
            to the original and far from the mean-ablated model. A point that loses nothing stands
            at the lower end.

    Raises:
        InputError: Several layers and none chosen, or a layer that is not there.
    """
    go = _graph_objects()
    layer = _one_of(table.layers, layer)
    bounds = table.bounds[layer]
    base = bounds.ce if log else 0.0
    figure = go.Figure()
    for colour, kind in zip(_colours(len(table.kinds)), table.kinds, strict=True):
        points = [point for point in table.points if (point.kind, point.layer) == (kind, layer)]
        curve = table.curve(kind, layer)
        off = [point for point in points if point not in curve]
        for some, mode, marks in ((curve, "lines+markers", None), (off, "markers", "circle-open")):
            if some:
                heights = [max(point.ce - base, _LEAST) for point in some]
                figure.add_trace(_pareto_trace(go, kind, some, heights, mode, colour, marks))
    every = [point.l0 for point in table.points if point.layer == layer]
    lines = {"mean-ablated MLP": bounds.ce_mean - base}
    if not log:
        lines["original model"] = bounds.ce
    for (name, value), dash in zip(lines.items(), ("dot", "dash"), strict=False):
        ends = {"x": [min(every), max(every)], "y": [value, value], "name": name}
        figure.add_trace(go.Scatter(**ends, mode="lines", line={"color": _GREY, "dash": dash}))
    what = "rise of the cross-entropy" if log else "cross-entropy of the next token"
    ticks = [2**n for n in range(20)]
    figure.update_xaxes(title="L0: active features per token", type="log", tickvals=ticks)
    figure.update_yaxes(title=f"{what} (nats)", type="log" if log else "linear")
    title = f"Layer {layer}: {table.n_predictions:,} predictions"
    title += f", original model {bounds.ce:.3f} nats" if log else ""
    return figure.update_layout(title=title, template="simple_white")


def _pareto_trace(
    go: Any,
    kind: str,
    points: Sequence[Any],
    heights: list[float],
    mode: str,
    colour: str,
    symbol: str | None,
) -> Any:
    settings = [", ".join(f"{k}={v:g}" for k, v in point.setting.items()) for point in points]
    return go.Scatter(
        x=[point.l0 for point in points],
        y=heights,
        mode=mode,
        name=kind,
        legendgroup=kind,
        showlegend=symbol is None,
        line={"color": colour},
        marker={"color": colour, "symbol": symbol or "circle"},
        text=[f"{name}: CE {p.ce:.4f}" for name, p in zip(settings, points, strict=True)],
        hovertemplate="L0 %{x:.1f}<br>%{text}",
    )


def plot_completeness(graphs: AttributionGraph | Mapping[str, AttributionGraph]) -> Figure:
    """Completeness by layer: the share of the nodes' input that is not from error nodes.

    Args:
        graphs: A graph, or several by name, such as one per transcoder set.
    """
    from .circuits.by_layer import completeness_by_layer

    go = _graph_objects()
    named = graphs if isinstance(graphs, Mapping) else {"": graphs}
    if not named:
        raise InputError("no graph to plot")
    figure = go.Figure()
    for colour, (name, graph) in zip(_colours(len(named)), named.items(), strict=True):
        layers = completeness_by_layer(graph)
        last = max(layers, default=0)
        figure.add_trace(
            go.Bar(
                x=["logits" if layer == last else f"layer {layer}" for layer in layers],
                y=[1 - one["errors"] for one in layers.values()],
                name=name,
                marker={"color": colour},
                customdata=[[one[k] for k in ("features", "tokens")] for one in layers.values()],
                hovertemplate="%{x}<br>completeness %{y:.3f}<br>from features "
                "%{customdata[0]:.3f}, tokens %{customdata[1]:.3f}",
            )
        )
    figure.update_yaxes(title="share of input not from errors", range=[0, 1])
    return figure.update_layout(
        title="Completeness by layer",
        template="simple_white",
        barmode="group",
        showlegend=len(named) > 1,
    )


def plot_effects(
    predicted: EffectTable | Tensor | Sequence[float],
    measured: Tensor | Sequence[float] | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Predicted against measured effects, with the line on which they would be equal.

    Args:
        predicted: What ``predicted_vs_measured`` returned, or the predicted effects ``(n,)``.
        measured: The measured ones ``(n,)``, if ``predicted`` is not a table.
        labels: A name for each.

    Raises:
        InputError: No effects, or columns of unequal lengths.
    """
    import torch

    from .circuits.effects import agreement

    go = _graph_objects()
    if measured is None:
        if not hasattr(predicted, "measured"):
            raise InputError("give the measured effects as well, or an EffectTable")
        table: Any = predicted
        predicted, measured, labels = table.predicted, table.measured, table.labels
    x, y = (torch.as_tensor(column).double().flatten() for column in (predicted, measured))
    if not len(x) or len(x) != len(y) or (labels is not None and len(labels) != len(x)):
        raise InputError(f"{len(x)} predicted and {len(y)} measured effects: need as many of each")
    found = agreement(x, y)
    low, high = float(torch.minimum(x, y).min()), float(torch.maximum(x, y).max())
    figure = go.Figure(
        [
            go.Scatter(
                x=[low, high], y=[low, high], mode="lines", line={"color": _GREY, "dash": "dash"}
            ),
            go.Scatter(
                x=x.tolist(),
                y=y.tolist(),
                mode="markers",
                marker={"color": COLOURS[0]},
                text=None if labels is None else list(labels),
                hovertemplate="%{text}<br>predicted %{x:.4f}<br>measured %{y:.4f}<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title="predicted effect", zeroline=True)
    figure.update_yaxes(title="measured effect", zeroline=True)
    title = f"{len(x)} effects: sign agreement {found.sign:.0%}, Spearman {found.spearman:.2f}"
    return figure.update_layout(title=title, template="simple_white", showlegend=False)


def plot_logit_effects(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    feature: int,
    *,
    top: int = 10,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Figure:
    """Bars of the tokens whose logits a feature raises and lowers the most.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        layer: Which layer.
        feature: Which feature.
        top: How many tokens at either end.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``.
    """
    from .circuits.collect import token_texts
    from .circuits.weights import logit_effects

    go = _graph_objects()
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    effects = logit_effects(model, transcoders, layer, [feature], sites=sites, remote=remote)[0]
    order = effects.argsort()
    chosen = order if len(order) <= 2 * top else order[[*range(top), *range(-top, 0)]]
    values = effects[chosen].tolist()
    names = [repr(text) for text in token_texts(model, chosen)]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=list(range(len(values))),
            orientation="h",
            marker={"color": [COLOURS[0] if value > 0 else COLOURS[1] for value in values]},
            text=names,
            textposition="none",
            hovertemplate="%{text}: %{x:+.3f}<extra></extra>",
        )
    )
    # By place and not by name: two tokens may look the same.
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names)
    figure.update_xaxes(title="direct effect on the logit, per unit of activation")
    title = f"Feature {feature} of layer {layer}"
    return figure.update_layout(title=title, template="simple_white", height=160 + 20 * len(names))


def plot_attention(circuit: CircuitRun, target: FeatureVector, path: Path) -> Figure:
    """The attention patterns of the heads along a path, with the path's own steps marked.

    Args:
        circuit: The run.
        target: What the path explains.
        path: From ``top_paths``; its attention steps are shown, nearest to the target first.

    Raises:
        InputError: No head lies on the path.
    """
    from plotly.subplots import make_subplots

    go = _graph_objects()
    steps, at = [], target.position
    for step in path.steps:
        if step.kind == "attention":
            steps.append((step, at))
        at = step.position
    if not steps:
        raise InputError(f"no attention head lies on this path: {path}")
    titles = [f"layer {step.layer}, head {step.index}" for step, _ in steps]
    figure = make_subplots(cols=len(steps), subplot_titles=titles, shared_yaxes=True)
    names = [f"{i} {text!r}" for i, text in enumerate(circuit.token_texts)]
    for column, (step, to) in enumerate(steps, start=1):
        pattern = circuit.run.pattern[step.layer][step.index].float().tolist()
        heat = go.Heatmap(
            z=pattern,
            x=names,
            y=names,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            showscale=column == 1,
            hovertemplate="from %{x}<br>to %{y}<br>%{z:.3f}<extra></extra>",
        )
        ring = {"symbol": "circle-open", "size": 14, "color": COLOURS[1], "line": {"width": 3}}
        mark = go.Scatter(
            x=[names[step.position]], y=[names[to]], mode="markers", marker=ring, showlegend=False
        )
        figure.add_trace(heat, row=1, col=column).add_trace(mark, row=1, col=column)
        figure.update_xaxes(title="from", row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title="to", row=1, col=1)
    return figure.update_layout(title=str(path), template="simple_white")


def _graph_objects() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise InputError("plots need plotly: pip install 'nnsight-transcoders[viz]'") from error
    return go


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _one_of(layers: Sequence[int], layer: int | None) -> int:
    if layer is None and len(layers) == 1:
        return layers[0]
    if layer is None or layer not in layers:
        raise InputError(f"the table has layers {list(layers)}: choose one, got {layer}")
    return layer

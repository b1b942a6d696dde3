"""An attribution graph as one self-contained HTML page, and as a frame in a notebook.

The page must open anywhere (a mail attachment, a cluster without network), so data, style and
script are inside it, and its Content-Security-Policy forbids every connection. Labels come from
tokenizers and from other people's feature descriptions, so they are treated as hostile: they travel
as JSON in which no character can end the element, and the script shows them as text only.

Numbers are written with nine significant digits, which is what a float32 needs to come back
exactly: the page prunes with the algorithm of ``circuits/prune.py`` and has to find the same nodes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight_transcoders._version import __version__
from nnsight_transcoders.circuits.prune import normalised_weights
from nnsight_transcoders.errors import InputError

if TYPE_CHECKING:
    from nnsight_transcoders.circuits.graph import AttributionGraph

#: Version of the page's data; the script refuses another one.
DATA_VERSION = 1

#: Edges in a notebook's frame: a notebook keeps its output, so it gets fewer than a page.
NOTEBOOK_EDGES = 20_000

#: Characters that could end a script element or a line of JavaScript.
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}

#: Entries of a graph's metadata that the page shows in places of their own.
_APART = {"pruning", "labels", "pinned", "supernodes"}

FeatureDetails = Mapping[str, Mapping[str, Any]]


def render_graph(
    graph: AttributionGraph,
    *,
    title: str | None = None,
    max_edges: int = 100_000,
    feature_details: FeatureDetails | None = None,
) -> str:
    """The page as HTML text.

    Args:
        graph: The graph; a graph that was not pruned opens with the default thresholds applied,
            which the reader can change.
        title: Heading (default: the prompt).
        max_edges: A graph with more edges is shown with those of the largest influence, and the
            page says so.
        feature_details: What is known about features, by ``"layer_feature"``: any of ``label``
            (text), ``top_logits``, ``bottom_logits``, ``de_embedding`` (lists of ``[text,
            value]``), ``examples`` (list of ``{"tokens": [...], "activations": [...]}``, perhaps
            with ``"seen"``, how often these tokens stand in the text), ``density``,
            ``max_activation`` and ``histogram`` (``{"counts": [...], "width": ...}``).
            ``FeatureBundle.details`` and ``feature_details`` give such.

    Raises:
        InputError: A number of the graph or of ``feature_details`` is NaN or infinite, or
            ``max_edges`` is negative.
    """
    data = page_data(graph, title=title, max_edges=max_edges, feature_details=feature_details)
    return fill_template("page", "viewer.js", data, "the graph's metadata or feature_details")


def fill_template(template: str, script: str, data: Mapping[str, Any], what: str) -> str:
    """A page with its data, style and script inside it.

    Args:
        template: Name of the template of its body.
        script: File name of its script.
        data: What the script reads; its ``"title"`` is the page's.
        what: What to name if the data cannot be written.

    Raises:
        InputError: A number is NaN or infinite, or something is no JSON.
    """
    # Half a character (a lone surrogate) could not be written to a file.
    title = data["title"].encode("utf-8", "replace").decode("utf-8")
    try:
        text = json.dumps({**data, "title": title}, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} cannot be written as JSON: {error}") from error
    body = Template(_asset(f"{template}.html")).substitute(
        data=text.translate(_UNSAFE), script=_asset(script)
    )
    return Template(_asset("document.html")).substitute(
        title=html.escape(title),
        version=html.escape(__version__),
        style=_asset("viewer.css"),
        body=body,
    )


def notebook_frame(graph: AttributionGraph, height: int = 700, **options: Any) -> str:
    """The page inside an ``<iframe>``, for Jupyter, VS Code and nbconvert.

    The frame is sandboxed: the page's script cannot reach the notebook around it.

    Args:
        graph: The graph.
        height: Height of the frame in pixels.
        **options: See ``render_graph``; ``max_edges`` is 20,000 here unless given.
    """
    page = render_graph(graph, **{"max_edges": NOTEBOOK_EDGES, **options})
    return frame(page, "Attribution graph", height)


def frame(page: str, title: str, height: int) -> str:
    """A page inside a sandboxed ``<iframe>``.

    Args:
        page: The page as HTML text.
        title: Of the frame, for screen readers.
        height: In pixels.
    """
    return (
        f'<iframe srcdoc="{html.escape(page)}" title="{html.escape(title)}" '
        f'sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {int(height)}px; border: 0"></iframe>'
    )


def page_data(
    graph: AttributionGraph,
    *,
    title: str | None = None,
    max_edges: int = 100_000,
    feature_details: FeatureDetails | None = None,
) -> dict[str, Any]:
    """What the page holds, ready for ``json.dumps``; arguments as for ``render_graph``.

    Nodes and edges are tables of columns, which takes a third of the space of a list of objects.
    """
    # First, because influence is not defined for weights that are not finite.
    _check_finite("weight", graph.weight)
    influence = graph.influence()
    shown = _strongest(graph, influence, max_edges)
    heading = "".join(graph.tokens) if title is None else title
    return {
        "version": DATA_VERSION,
        "title": heading.encode("utf-8", "replace").decode("utf-8"),
        "tokens": list(graph.tokens),
        "target_names": list(graph.target_names),
        "n_layers": graph.n_layers,
        "nodes": _nodes(shown, influence),
        "edges": {
            "source": shown.source.tolist(),
            "target": shown.target.tolist(),
            "weight": _numbers("weight", shown.weight),
        },
        "n_edges": graph.n_edges,
        "scores": {
            "completeness_error": graph.completeness_error,
            "replacement_score": graph.replacement_score,
            "completeness_score": graph.completeness_score,
        },
        "pruning": graph.metadata.get("pruning"),
        "metadata": {k: v for k, v in graph.metadata.items() if k not in _APART},
        "labels": graph.metadata.get("labels", {}),
        "pinned": graph.metadata.get("pinned", []),
        "supernodes": graph.metadata.get("supernodes", {}),
        "feature_details": _details(graph, feature_details or {}),
    }


def _strongest(graph: AttributionGraph, influence: Tensor, max_edges: int) -> AttributionGraph:
    """The graph with at most ``max_edges`` edges: those of the largest influence."""
    if max_edges < 0:
        raise InputError(f"max_edges must not be negative, got {max_edges}")
    if graph.n_edges <= max_edges:
        return graph
    reach = influence + graph.logit_weights()
    scores = normalised_weights(graph.target, graph.weight, graph.n_nodes) * reach[graph.target]
    keep = torch.zeros(graph.n_edges, dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:max_edges]] = True
    return graph.subgraph(torch.ones(graph.n_nodes, dtype=torch.bool), keep)


def _nodes(graph: AttributionGraph, influence: Tensor) -> dict[str, list[Any]]:
    """The node table, one list per column."""
    nodes = list(graph.nodes())
    columns: dict[str, list[Any]] = {
        "id": [node.id for node in nodes],
        "kind": [node.kind for node in nodes],
        "layer": graph.layer.tolist(),
        "position": graph.position.tolist(),
        "index": graph.index.tolist(),
        "label": [graph.label(node.number) for node in nodes],
        "influence": _numbers("influence", influence),
    }
    for name in ("value", "total", "bias", "omitted", "probability"):
        columns[name] = _numbers(name, getattr(graph, name))
    return columns


def _numbers(name: str, tensor: Tensor) -> list[float]:
    """A tensor as float32 numbers that survive a round trip through text."""
    return [float(f"{value:.9g}") for value in _check_finite(name, tensor).tolist()]


def _check_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32.

    Raises:
        InputError: One of its numbers is NaN or infinite.
    """
    values = tensor.detach().to("cpu", torch.float32)
    finite = values.isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"the graph's {name} is {float(values[first])} at {first}: a page holds finite numbers "
            f"only; look for NaN or overflow in the run that made the graph"
        )
    return values


def _details(graph: AttributionGraph, details: FeatureDetails) -> dict[str, dict[str, Any]]:
    """The details of those features that are in the graph."""
    features = graph.of_kind("feature")
    layers, numbers = graph.layer[features].tolist(), graph.index[features].tolist()
    names = {f"{layer}_{feature}" for layer, feature in zip(layers, numbers, strict=True)}
    return {name: dict(details[name]) for name in sorted(names & details.keys())}


def _asset(name: str) -> str:
    """A file of ``viewer/assets`` as text."""
    return (resources.files("nnsight_transcoders.viewer") / "assets" / name).read_text(
        encoding="utf-8"
    )

"""Commands that exchange graphs with Neuronpedia and circuit-tracer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nnsight_transcoders.errors import InputError

from .app import Json, app, errors_as_messages
from .output import graph_info, print_json, print_text

Graph = Annotated[Path, typer.Argument(help="A graph file, such as out/graph.safetensors.")]
Slug = Annotated[str, typer.Option(help="The graph's name: letters, digits, '_', '.', '-'.")]
NodeThreshold = Annotated[float, typer.Option(help="Influence kept by pruning nodes.")]
EdgeThreshold = Annotated[float, typer.Option(help="Influence kept by pruning edges.")]


@app.command("export")
def export_graph(
    graph: Graph,
    out: Annotated[Path, typer.Argument(help="A .json or .pt file, or a folder (see --to).")],
    to: Annotated[str, typer.Option(help="'neuronpedia' or 'circuit-tracer'.")] = "circuit-tracer",
    slug: Slug = "",
    scan: Annotated[
        str, typer.Option(help="Neuronpedia's model id, or the transcoders' Hub id.")
    ] = "",
    source_set: Annotated[str, typer.Option(help="Neuronpedia's source set.")] = "",
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
) -> None:
    """Write a graph for Neuronpedia (a .json file) or circuit-tracer (a folder, or a .pt file)."""
    with errors_as_messages():
        from nnsight_transcoders.circuits.graph import AttributionGraph

        if to not in ("neuronpedia", "circuit-tracer"):
            raise InputError(f"--to is 'neuronpedia' or 'circuit-tracer', not {to!r}")
        loaded = AttributionGraph.load(graph)
        thresholds: dict[str, Any] = {
            "node_threshold": node_threshold,
            "edge_threshold": edge_threshold,
        }
        if to == "circuit-tracer":
            written = loaded.to_circuit_tracer(
                out, slug=slug or None, scan=scan or None, **thresholds
            )
        else:
            if not scan:
                raise InputError("--scan is needed: Neuronpedia's id of the model")
            loaded.to_neuronpedia(
                out, slug=slug, model_id=scan, source_set=source_set or None, **thresholds
            )
            written = out
    print_text(str(written))


@app.command("import")
def import_graph(
    file: Annotated[Path, typer.Argument(help="Graph JSON, or circuit-tracer's .pt file.")],
    out: Annotated[Path, typer.Argument(help="The graph file to write.")],
    as_json: Json = False,
) -> None:
    """Read a graph of Neuronpedia or circuit-tracer and write it as this package's graph file."""
    with errors_as_messages():
        from nnsight_transcoders.circuits.graph import AttributionGraph

        graph = AttributionGraph.from_circuit_tracer(file)
        graph.save(out)
    if as_json:
        print_json(graph_info(graph) | {"graph_file": str(out)})
        return
    print_text(f"{graph.summary()}\n\ngraph:  {out}")


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="What `export --to neuronpedia` wrote.")],
    base_url: Annotated[str, typer.Option(help="Where Neuronpedia is.")] = (
        "https://www.neuronpedia.org"
    ),
) -> None:
    """Upload a graph to Neuronpedia; the key is read from NEURONPEDIA_API_KEY."""
    with errors_as_messages():
        from nnsight_transcoders.interop.upload import upload_graph

        address = upload_graph(file, base_url=base_url)
    print_text(address)

"""Commands that make and show graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnsight_transcoders.errors import InputError

from .app import (
    Device,
    Dtype,
    FormatName,
    Json,
    Model,
    Options,
    RemoteHost,
    Revision,
    Transcoders,
    app,
    check_text,
    errors_as_messages,
    load_set,
    open_model,
    parse_layers,
    remote_of,
    writable,
)
from .output import graph_info, print_json, print_text

DEFAULT_PROMPT = "The war lasted from 1732 to 17"


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="The prompt.")] = DEFAULT_PROMPT,
    model: Model = "builtin",
    transcoders: Transcoders = "",
    layers: Annotated[str, typer.Option(help="Such as '0-3,7' (default: all).")] = "",
    target: Annotated[list[str] | None, typer.Option(help="Token(s) to explain.")] = None,
    max_nodes: Annotated[int, typer.Option(help="At most so many feature nodes.")] = 7500,
    max_n_logits: Annotated[int, typer.Option(help="At most so many logit nodes.")] = 10,
    desired_logit_prob: Annotated[float, typer.Option(help="Probability they cover.")] = 0.95,
    node_threshold: Annotated[float, typer.Option(help="Influence kept by pruning nodes.")] = 0.8,
    edge_threshold: Annotated[float, typer.Option(help="Influence kept by pruning edges.")] = 0.98,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("out"),
    revision: Revision = None,
    format_name: FormatName = None,
    option: Options = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    remote: RemoteHost = "",
    keep: Annotated[Path | None, typer.Option(help="Folder to resume a remote graph.")] = None,
    as_json: Json = False,
) -> None:
    """Trace the circuit of a prompt: writes graph.safetensors and circuit.html."""
    with errors_as_messages():
        from nnsight_transcoders.circuits.attribution import attribute
        from nnsight_transcoders.circuits.weights import feature_details

        _check_thresholds(node_threshold, edge_threshold)
        check_text(prompt, *(target or []))
        writable(out_folder)
        chosen = load_set(transcoders, model, option, revision=revision, format=format_name)
        if layers:
            chosen = chosen.subset(parse_layers(layers))
        loaded = open_model(model, dtype, device, remote)
        graph = attribute(
            loaded,
            chosen,
            prompt,
            targets=target or None,
            max_feature_nodes=max_nodes,
            max_n_logits=max_n_logits,
            desired_logit_prob=desired_logit_prob,
            verbose=not as_json,
            remote=remote_of(remote),
            keep=keep,
        )
        pruned = graph.prune(node_threshold, edge_threshold)
        graph_file = graph.save(out_folder / "graph.safetensors")
        page = out_folder / "circuit.html"
        details = feature_details(loaded, chosen, pruned, remote=remote_of(remote))
        pruned.to_html(page, feature_details=details)
    if as_json:
        files = {"graph_file": str(graph_file), "page": str(page)}
        print_json(graph_info(graph) | {"pruned": graph_info(pruned)} | files)
        return
    print_text(graph.summary())
    print_text(f"\npruned: {pruned.n_nodes} nodes, {pruned.n_edges} edges")
    print_text(f"graph:  {graph_file}\npage:   {page}  (open it in a browser)")


def _check_thresholds(node: float, edge: float) -> None:
    """Find out before minutes of computing that pruning would refuse its thresholds."""
    for name, value in (("--node-threshold", node), ("--edge-threshold", edge)):
        if not 0 < value <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, got {value}")

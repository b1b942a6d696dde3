"""The command that follows one feature or one next token back along paths."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    remote_of,
    writable,
)
from .graphs import DEFAULT_PROMPT
from .output import print_json, print_text


@app.command()
def paths(
    prompt: Annotated[str, typer.Argument(help="The prompt.")] = DEFAULT_PROMPT,
    feature: Annotated[str, typer.Option(help="LAYER_INDEX or LAYER_INDEX_POSITION.")] = "",
    target: Annotated[str, typer.Option(help="Instead: a next token to explain.")] = "",
    depth: Annotated[int, typer.Option(help="Longest path, in components.")] = 3,
    per_node: Annotated[int, typer.Option(help="Contributions of a node that are followed.")] = 10,
    beam: Annotated[int, typer.Option(help="Paths that are kept after each round.")] = 50,
    top: Annotated[int, typer.Option(help="Paths that are printed.")] = 20,
    model: Model = "builtin",
    transcoders: Transcoders = "",
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("out"),
    revision: Revision = None,
    format_name: FormatName = None,
    option: Options = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    remote: RemoteHost = "",
    as_json: Json = False,
) -> None:
    """What carries most to a feature or a token: prints paths, writes their graph and its page."""
    with errors_as_messages():
        from nnsight_transcoders.circuits.contributions import CircuitRun
        from nnsight_transcoders.circuits.path_graph import path_graph
        from nnsight_transcoders.circuits.paths import top_paths
        from nnsight_transcoders.circuits.weights import feature_details

        if feature and target:
            raise InputError("give --feature or --target, not both")
        node = parse_feature(feature) if feature else None
        check_text(prompt, target)
        writable(out_folder)
        chosen = load_set(transcoders, model, option, revision=revision, format=format_name)
        loaded = open_model(model, dtype, device, remote)
        where = remote_of(remote)
        circuit = CircuitRun.collect(loaded, chosen, prompt, remote=where)
        likeliest = int(circuit.run.probabilities[-1].argmax())
        root = circuit.feature(*node) if node else circuit.token(target or likeliest)
        found = top_paths(circuit, root, depth=depth, per_node=per_node, beam=beam)
        graph = path_graph(circuit, root, found)
        graph_file = graph.save(out_folder / "paths.safetensors")
        page = out_folder / "paths.html"
        details = feature_details(loaded, chosen, graph, remote=where)
        graph.to_html(page, feature_details=details)
    total = circuit.total(root)
    if as_json:
        rows: list[dict[str, Any]] = [
            {"value": path.value, "ended": path.ended, "steps": [asdict(s) for s in path.steps]}
            for path in found
        ]
        files = {"graph_file": str(graph_file), "page": str(page)}
        print_json({"target": root.name, "total": total, "paths": rows} | files)
        return
    print_text(f"{total:+.4f}  {root.name}")
    print_text("\n".join(f"  {path}" for path in found[: max(0, top)]))
    print_text(f"\ngraph:  {graph_file}\npage:   {page}  (open it in a browser)")


def parse_feature(text: str) -> tuple[int, ...]:
    """``"8_355_12"``, as graphs call it, or ``"8_355"`` -> its layer, number and position, if any.

    Raises:
        InputError: Not of that form.
    """
    found = re.fullmatch(r"(\d{1,9})_(\d{1,9})(?:_(-?\d{1,9}))?", text.strip(), re.ASCII)
    if not found:
        raise InputError(
            "--feature takes LAYER_INDEX_POSITION, such as 8_355_12, or LAYER_INDEX for the last "
            f"position, got {text!r}"
        )
    return tuple(int(part) for part in found.groups() if part is not None)

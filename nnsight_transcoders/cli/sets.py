"""Commands that open, measure and list transcoder sets and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

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
    errors_as_messages,
    load_model,
    load_set,
    open_model,
    read_lines,
    remote_of,
)
from .output import graph_info, out, print_json, print_layers, print_text


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A graph file, a transcoder folder or a Hub id.")],
    revision: Revision = None,
    format_name: FormatName = None,
    option: Options = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint or a graph file holds."""
    with errors_as_messages():
        if Path(what).is_file():
            from nnsight_transcoders.circuits.graph import AttributionGraph

            graph = AttributionGraph.load(what)
            text, data = graph.summary(), graph_info(graph)
        else:
            chosen = load_set(what, options=option, revision=revision, format=format_name)
            text = repr(chosen)
            data = {
                "layers": {str(n): chosen.config(n).to_dict() for n in chosen.layers},
                "provenance": chosen.provenance,
            }
    if as_json:
        print_json(data)
        return
    print_text(text)
    if "layers" in data:
        print_layers(data["layers"])


@app.command()
def verify(
    model: Model = "builtin",
    transcoders: Transcoders = "",
    text: Annotated[Path | None, typer.Option(help="Text file, one text per line.")] = None,
    remote: RemoteHost = "",
    revision: Revision = None,
    format_name: FormatName = None,
    option: Options = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how well a set fits a model: FVU, L0 and cross-entropy, layer by layer."""
    with errors_as_messages():
        from nnsight_transcoders.evaluation.verifying import verify as run

        lines = None if text is None else read_lines(text)
        chosen = load_set(transcoders, model, option, revision=revision, format=format_name)
        loaded = open_model(model, dtype, device, remote)
        where = remote_of(remote)
        report = run(loaded, chosen, lines, remote=where, verbose=not as_json)
    if as_json:
        print_json(report.to_dict())
    else:
        table = Table("layer", "FVU", "L0", "CE change", "verdict")
        for fit in report.layers:
            change = "-" if fit.ce_change is None else f"{fit.ce_change:+.4f}"
            table.add_row(str(fit.layer), f"{fit.fvu:.4f}", f"{fit.l0:.1f}", change, fit.verdict)
        out.print(table)
        print_text(
            f"cross-entropy {report.ce:.4f}; with all layers replaced {report.ce_replaced:.4f} "
            f"({report.n_tokens} tokens)"
        )
        for why in dict.fromkeys(fit.hypothesis for fit in report.layers if fit.hypothesis):
            same = [str(fit.layer) for fit in report.layers if fit.hypothesis == why]
            print_text(f"layer{'s' if len(same) > 1 else ''} {', '.join(same)}: {why}")
    if not report.ok:
        raise typer.Exit(3)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Hub id or folder, or 'builtin'.")] = "builtin",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Does the package work on this model? Finds its sites and measures the identities."""
    with errors_as_messages():
        from nnsight_transcoders.check import check as run

        report = run(load_model(model, dtype, device), verbose=not as_json)
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(str(report.sites))
        table = Table("identity", "relative error", "limit", "holds")
        for row in report.rows:
            value = "-" if row.value is None else f"{row.value:.1e}"
            holds = "yes" if row.ok else "NO"
            table.add_row(row.name, value, f"{row.limit:.0e}", f"{holds} {row.note}".strip())
        out.print(table)
    if not report.ok:
        raise typer.Exit(3)


@app.command()
def builtin(as_json: Json = False) -> None:
    """The model and the transcoder sets shipped with the package, and what they reach."""
    with errors_as_messages():
        from nnsight_transcoders.builtin import BUILTIN_SETS, builtin_model_path, record

        data = {
            "model": builtin_model_path(),
            "sets": {name: str(path) for name, path in BUILTIN_SETS.items()},
            "record": record(),
        }
    if as_json:
        print_json(data)
        return
    print_text(f"model: {data['model']}")
    for name in data["sets"]:
        print_text(f"set:   {name}")
    out.print_json(json.dumps(data["record"]))


@app.command("list")
def list_sets(
    base_model: Annotated[str, typer.Option(help="Only sets whose model contains this.")] = "",
    as_json: Json = False,
) -> None:
    """The published transcoder sets this package knows of; nothing is downloaded."""
    from nnsight_transcoders.catalogue import catalogue

    entries = catalogue(base_model or None)
    if as_json:
        print_json({"sets": [entry.to_dict() for entry in entries]})
        return
    table = Table(Column("repository, model", no_wrap=True), "layers x width", "kind, sites")
    for e in entries:
        named = {name: "?" if cell is None else str(cell) for name, cell in e.to_dict().items()}
        table.add_row(
            f"{e.repository}\n  {named['base_model']}",
            f"{named['layers']} x {named['width']}\n{named['activation']}",
            f"{e.kind}\n{named['sites']}",
        )
    out.print(table)
    print_text(f"{len(entries)} sets; remarks, formats and licences: --json, or docs/catalogue.md")

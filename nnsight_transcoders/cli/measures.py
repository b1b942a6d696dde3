"""The command that measures what a set is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    load_set,
    open_model,
    parse_layers,
    remote_of,
    writable,
)
from .output import print_json, print_text


@app.command("eval")
def evaluate(
    model: Model = "builtin",
    transcoders: Transcoders = "",
    data: Annotated[str, typer.Option(help="Text file, folder of *.txt, or 'builtin'.")] = "",
    baseline: Annotated[str, typer.Option(help="Another set to measure beside it.")] = "",
    layers: Annotated[str, typer.Option(help="Such as '0-3,7' (default: all).")] = "",
    each_layer: Annotated[
        bool, typer.Option(help="Replace each layer alone as well: three runs per layer.")
    ] = True,
    context: Annotated[int | None, typer.Option(help="Longest piece of text, in tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pieces that run at once.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the data that are used.")] = 65_536,
    report: Annotated[Path | None, typer.Option("--out", help="JSON file for the report.")] = None,
    remote: RemoteHost = "",
    revision: Revision = None,
    format_name: FormatName = None,
    option: Options = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a set: L0, FVU, cross-entropy, KL and recovered, by layer and all together."""
    with errors_as_messages():
        from nnsight_transcoders.errors import InputError
        from nnsight_transcoders.evaluation.measuring import evaluate as run

        if not data:
            if model != "builtin":
                raise InputError("--data is needed for a model other than 'builtin'")
            data = "builtin"
        if report is not None:
            writable(report.parent)
        chosen = load_set(transcoders, model, option, revision=revision, format=format_name)
        other = load_set(baseline, model) if baseline else None
        if layers:
            chosen = chosen.subset(parse_layers(layers))
            other = None if other is None else other.subset(parse_layers(layers))
        found = run(
            open_model(model, dtype, device, remote),
            chosen,
            data,
            baseline=other,
            each_layer=each_layer,
            context=context,
            batch_size=batch_size,
            max_tokens=max_tokens,
            remote=remote_of(remote),
            verbose=not as_json,
        )
        if report is not None:
            found.save(report)
    if as_json:
        print_json(found.to_dict())
        return
    print_text(str(found))
    if report is not None:
        print_text(f"report: {report}")

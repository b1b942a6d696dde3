"""Commands that show things: ``view`` serves pages, ``features`` collects what they say."""

from __future__ import annotations

import webbrowser
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
)
from .output import print_json, print_text


@app.command()
def view(
    path: Annotated[
        Path, typer.Argument(help="A folder, a graph file, a feature bundle or a page.")
    ] = Path("out"),
    port: Annotated[int, typer.Option(help="Port to listen on (default: any free one).")] = 0,
    features: Annotated[
        Path | None, typer.Option(help="Feature bundle, for what graph pages say of features.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it.")] = True,
) -> None:
    """Show graphs and features in a browser, served to this machine only, until Ctrl+C."""
    with errors_as_messages():
        from nnsight_transcoders.features.bundle import FeatureBundle
        from nnsight_transcoders.viewer.server import Viewer

        bundle = None if features is None else FeatureBundle.open(features)
        server = Viewer(path, port, bundle)
        print_text(f"{server.url}  (Ctrl+C ends)")
        if browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_text("")
        finally:
            server.server_close()


@app.command()
def features(
    text: Annotated[str, typer.Argument(help="A text file or folder of them, or 'builtin'.")],
    out: Annotated[Path, typer.Argument(help="Folder of the bundle.")] = Path("out/features"),
    model: Model = "builtin",
    transcoders: Transcoders = "",
    layers: Annotated[str, typer.Option(help="Such as '0-3,7' (default: all).")] = "",
    context: Annotated[int | None, typer.Option(help="Tokens run together.")] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts per run.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    remote: RemoteHost = "",
    revision: Revision = None,
    format_name: FormatName = None,
    option: Options = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Collect what features respond to on a text; goes on where it was interrupted."""
    with errors_as_messages():
        from nnsight_transcoders.features.collection import collect_features

        bundle = collect_features(
            open_model(model, dtype, device, remote),
            load_set(transcoders, model, option, revision=revision, format=format_name),
            text,
            out,
            layers=parse_layers(layers) if layers else None,
            context=context,
            batch_size=batch_size,
            max_tokens=max_tokens,
            remote=remote_of(remote),
            verbose=not as_json,
        )
    if as_json:
        print_json({"bundle": str(out), **bundle.metadata})
        return
    print_text(f"{bundle!r}\nshow it: nnsight-transcoders view {out}")

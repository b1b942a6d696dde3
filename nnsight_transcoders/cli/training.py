"""The command that trains transcoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app, errors_as_messages, load_set, open_model, remote_of, writable
from .output import print_json, print_text


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file: model, data, out, settings.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, over what the file says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train transcoders; what is there of the same run is gone on with."""
    with errors_as_messages():
        from nnsight_transcoders.training.run_file import read_run_file
        from nnsight_transcoders.training.trainer import train as run

        file = read_run_file(config, settings or [])
        out = Path(file.out)
        writable(out)
        start = None if file.start is None else load_set(file.start)
        remote = file.remote if isinstance(file.remote, bool) else remote_of(file.remote)
        model = open_model(file.model, file.model_dtype, file.device, remote)
        trained = run(
            model,
            file.open_data(),
            file.config,
            out=out,
            start=start,
            remote=remote,
            verbose=not as_json,
        )
    if as_json:
        configs = {str(n): trained.config(n).to_dict() for n in trained.layers}
        print_json({"out": str(out), "layers": configs})
    else:
        print_text(f"{trained!r}\nsaved in {out}; measure it: see nnsight-transcoders verify")

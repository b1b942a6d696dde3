"""``nnsight-transcoders``: the command line. Thin: every command is one call of the library.

Exit codes: 0 success, 1 an error of this package (one clear message), 2 wrong arguments,
3 ``verify`` or ``check`` found something that does not hold.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from ._version import __version__
from .cli_output import err, graph_info, out, print_json, print_layers, print_text
from .errors import InputError, TranscoderError

if TYPE_CHECKING:
    from .sets import TranscoderSet

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Transcoders and circuit tracing for nnsight models.",
)
DEFAULT_PROMPT = "The war lasted from 1732 to 17"

Model = Annotated[str, typer.Option(help="Hub id or folder; 'builtin' is the model shipped here.")]
Transcoders = Annotated[str, typer.Option(help="Hub id, folder, or a builtin set's name.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the transcoders' repository.")]
Dtype = Annotated[str, typer.Option(help="The model's dtype, such as float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """One line on stderr and exit code 1 for errors that are not bugs."""
    try:
        yield
    except (TranscoderError, OSError) as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Transcoders and circuit tracing for nnsight models."""
    del version
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """An nnsight model with its weights, by Hub id, folder, or ``"builtin"``.

    Raises:
        InputError: No such model or device.
        ConfigError: No such dtype.
    """
    from nnsight import TransformersModel

    from .builtin import builtin_model_path
    from .transcoder import torch_dtype

    path = builtin_model_path() if name == "builtin" else name
    # Only "auto" (several devices) needs accelerate, which transformers wants for any device_map.
    options = {"device_map" if device == "auto" else "device": device, "dtype": torch_dtype(dtype)}
    _check_device(device)
    try:
        return TransformersModel(path, task="text-generation", dispatch=True, **options)
    except (OSError, ValueError) as error:  # what transformers raises for a name or a folder
        raise InputError(f"cannot load the model {name!r}: {error}") from error


def _check_device(name: str) -> None:
    import torch

    if name == "auto":
        return
    try:
        torch.zeros(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {error}") from error


def load_set(name: str, model: str = "builtin", **options: Any) -> TranscoderSet:
    """A transcoder set by name; the builtin model's own by default."""
    from .sets import TranscoderSet

    if not name:
        if model != "builtin":
            raise InputError("--transcoders is needed for a model other than 'builtin'")
        name = "builtin/per-layer"
    opened = TranscoderSet.from_pretrained(name, **options)
    for key in ("variant", "variants"):  # what was chosen where a repository holds several
        if key in opened.provenance:
            err.print(f"{name}: {key} {opened.provenance[key]}", markup=False)
    return opened


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
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Trace the circuit of a prompt: writes graph.safetensors and circuit.html."""
    with errors_as_messages():
        from .circuits.attribution import attribute
        from .circuits.weights import feature_details

        _check_thresholds(node_threshold, edge_threshold)
        _check_text(prompt, *(target or []))
        _writable(out_folder)
        chosen = load_set(transcoders, model, revision=revision)
        if layers:
            chosen = chosen.subset(parse_layers(layers))
        loaded = load_model(model, dtype, device)
        graph = attribute(
            loaded,
            chosen,
            prompt,
            targets=target or None,
            max_feature_nodes=max_nodes,
            max_n_logits=max_n_logits,
            desired_logit_prob=desired_logit_prob,
            verbose=not as_json,
        )
        pruned = graph.prune(node_threshold, edge_threshold)
        graph_file = graph.save(out_folder / "graph.safetensors")
        page = out_folder / "circuit.html"
        pruned.to_html(page, feature_details=feature_details(loaded, chosen, pruned))
    if as_json:
        files = {"graph_file": str(graph_file), "page": str(page)}
        print_json(graph_info(graph) | {"pruned": graph_info(pruned)} | files)
        return
    print_text(graph.summary())
    print_text(f"\npruned: {pruned.n_nodes} nodes, {pruned.n_edges} edges")
    print_text(f"graph:  {graph_file}\npage:   {page}  (open it in a browser)")


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A graph file, a transcoder folder or a Hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint or a graph file holds."""
    with errors_as_messages():
        if Path(what).is_file():
            from .circuits.graph import AttributionGraph

            graph = AttributionGraph.load(what)
            text, data = graph.summary(), graph_info(graph)
        else:
            chosen = load_set(what, revision=revision)
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
    revision: Revision = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how well a set fits a model: FVU, L0 and cross-entropy, layer by layer."""
    with errors_as_messages():
        from .evaluation import verify as run

        lines = None if text is None else _read_lines(text)
        chosen = load_set(transcoders, model, revision=revision)
        report = run(load_model(model, dtype, device), chosen, lines, verbose=not as_json)
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
        from .check import check as run

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
        from .builtin import BUILTIN_SETS, builtin_model_path, record

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
    from .catalogue import catalogue

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


def parse_layers(text: str) -> list[int]:
    """``"0-2,5"`` -> ``[0, 1, 2, 5]``.

    Raises:
        InputError: Not of that form.
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip(), re.ASCII)
        more = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not more:
            raise InputError(f"--layers takes numbers and ranges such as '0-3,7', got {text!r}")
        layers += more
    return layers


def _check_thresholds(node: float, edge: float) -> None:
    """Find out before minutes of computing that pruning would refuse its thresholds."""
    for name, value in (("--node-threshold", node), ("--edge-threshold", edge)):
        if not 0 < value <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, got {value}")


def _check_text(*texts: str) -> None:
    """Refuse arguments whose bytes are not text in the terminal's encoding."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{text!r} is not UTF-8 text: {error.reason}") from error


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text")
    return lines


def _writable(folder: Path) -> None:
    """Find out before minutes of computing whether the results can be written."""
    from ._files import atomic_path

    probe = folder / ".writable"
    with atomic_path(probe):
        pass
    probe.unlink()

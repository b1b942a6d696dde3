"""The command line's app, and what its commands share: options, loading, errors.

Exit codes: 0 success, 1 an error of this package (one clear message), 2 wrong arguments,
3 ``verify`` or ``check`` found something that does not hold.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import InputError, TranscoderError

from .output import err, out

if TYPE_CHECKING:
    from nnsight_transcoders.sets import TranscoderSet

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Transcoders and circuit tracing for nnsight models.",
)

Model = Annotated[str, typer.Option(help="Hub id or folder; 'builtin' is the model shipped here.")]
Transcoders = Annotated[str, typer.Option(help="Hub id, folder, or a builtin set's name.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the transcoders' repository.")]
FormatName = Annotated[
    str | None, typer.Option("--format", help="The checkpoint's format, where it cannot be told.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="A choice of the format, such as k=64 or variant=average_l0_71."
    ),
]
Dtype = Annotated[str, typer.Option(help="The model's dtype, such as float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]
RemoteHost = Annotated[
    str, typer.Option("--remote", help="NDIF server, or 'ndif' for nnsight's own setting.")
]
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

    from nnsight_transcoders.builtin import builtin_model_path
    from nnsight_transcoders.transcoder import torch_dtype

    path = builtin_model_path() if name == "builtin" else name
    # Only "auto" (several devices) needs accelerate, which transformers wants for any device_map.
    options = {"device_map" if device == "auto" else "device": device, "dtype": torch_dtype(dtype)}
    _check_device(device)
    try:
        return TransformersModel(path, task="text-generation", dispatch=True, **options)
    except (OSError, ValueError) as error:  # what transformers raises for a name or a folder
        raise InputError(f"cannot load the model {name!r}: {error}") from error


def load_remote_model(name: str) -> Any:
    """An nnsight model without its weights, for a model that a server holds.

    Raises:
        InputError: No such model.
    """
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    from nnsight_transcoders.builtin import builtin_model_path

    path = builtin_model_path() if name == "builtin" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        return TransformersModel(path, task="text-generation", tokenizer=tokenizer)
    except (OSError, ValueError) as error:  # what transformers raises for a name or a folder
        raise InputError(f"cannot load the model {name!r}: {error}") from error


def open_model(name: str, dtype: str, device: str, remote: str | bool) -> Any:
    """A model that is here, or, with ``--remote``, one that a server holds."""
    return load_remote_model(name) if remote else load_model(name, dtype, device)


def remote_of(host: str) -> str | bool:
    """``--remote`` as the library's ``remote=``."""
    return True if host == "ndif" else host or False


def _check_device(name: str) -> None:
    import torch

    if name == "auto":
        return
    try:
        torch.zeros(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {error}") from error


def load_set(
    name: str,
    model: str = "builtin",
    options: list[str] | None = None,
    **arguments: Any,
) -> TranscoderSet:
    """A transcoder set by name; the builtin model's own by default.

    Args:
        name: Hub id, folder, or a builtin set's name.
        model: The model it is for.
        options: The format's own choices, each ``"key=value"``.
        **arguments: As ``TranscoderSet.from_pretrained`` takes them.
    """
    from nnsight_transcoders.sets import TranscoderSet

    if not name:
        if model != "builtin":
            raise InputError("--transcoders is needed for a model other than 'builtin'")
        name = "builtin/per-layer"
    choices = parse_options(options or ())
    if twice := sorted(set(choices) & set(arguments)):
        raise InputError(f"--option {twice[0]}=...: use --{twice[0]} instead")
    opened = TranscoderSet.from_pretrained(name, **arguments, **choices)
    for key in ("variant", "variants"):  # what was chosen where a repository holds several
        if key in opened.provenance:
            err.print(f"{name}: {key} {opened.provenance[key]}", markup=False)
    return opened


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


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["k=64", "folder=a/b"]`` -> ``{"k": 64, "folder": "a/b"}``; values as in YAML.

    Raises:
        InputError: Not of that form.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--option takes key=value, such as k=64, got {pair!r}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {pair!r} is not a value: {error}") from error
    return options


def check_text(*texts: str) -> None:
    """Refuse arguments whose bytes are not text in the terminal's encoding."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{text!r} is not UTF-8 text: {error.reason}") from error


def read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text")
    return lines


def writable(folder: Path) -> None:
    """Find out before minutes of computing whether the results can be written."""
    from nnsight_transcoders._files import atomic_path

    probe = folder / ".writable"
    with atomic_path(probe):
        pass
    probe.unlink()

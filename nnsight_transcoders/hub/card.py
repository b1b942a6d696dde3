"""The model card of a saved set: metadata the Hub indexes, and a page that says how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from nnsight_transcoders.errors import ConfigError

#: A card with this line is rewritten on every save; without it, it is the author's and stays.
MARKER = "<!-- Written by nnsight-transcoders on every save. Delete this line to keep edits. -->"

_SITES = {
    "R": "the residual stream before the MLP's norm",
    "N0": "the MLP's norm before its gain",
    "N1": "the MLP's norm after its gain",
    "O": "the MLP's output",
    "O'": "the MLP's output after the norm that follows it",
}


def clean_metrics(metrics: Mapping[Any, Any] | None) -> dict[str, Any]:
    """Metrics as JSON has them: keys as text, one-element tensors as numbers, NaN as null.

    Raises:
        ConfigError: A value that is none of number, text, list or mapping.
    """
    return {str(key): _clean(value, str(key)) for key, value in (metrics or {}).items()}


def _clean(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner, name) for inner in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise ConfigError(f"metric {name} is a {type(value).__name__}; give a number, text or mapping")


def make_card(
    config: Mapping[str, Any], *, license: str | None = None, repo_id: str | None = None
) -> str:
    """The text of ``README.md`` for a checkpoint with this ``config.json``."""
    kind = "transcoder" if config["kind"] == "per-layer" else "cross-layer-transcoder"
    if _is_autoencoder(config):
        kind = "sparse-autoencoder"
    data = ModelCardData(
        library_name="nnsight-transcoders",
        base_model=config["base_model"],
        license=license,
        tags=[kind, "mechanistic-interpretability", "circuit-tracing"],
    )
    parts = [_title(config, repo_id), MARKER, _facts(config), _snippet(config, repo_id)]
    parts += [part for part in (_metrics(config["metrics"]), _source(config)) if part]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _title(config: Mapping[str, Any], repo_id: str | None) -> str:
    kind = "Transcoders" if config["kind"] == "per-layer" else "A cross-layer transcoder"
    if _is_autoencoder(config):
        kind = "Sparse autoencoders"
    name = repo_id.split("/")[-1] if repo_id else kind
    return f"# {name}\n\n{kind} for `{config['base_model'] or 'a model that is not named'}`."


def _facts(config: Mapping[str, Any]) -> str:
    layers = sorted(map(int, config["layers"]))
    first = config["layers"][str(layers[0])]
    activation = first["activation"] + (f", k = {first['k']}" if first["k"] else "")
    rows = {
        "Layers": ", ".join(map(str, layers)),
        "Model width": first["d_in"],
        "Features per layer": first["d_transcoder"],
        "Activation": activation,
        "Skip path": "yes" if first["skip"] else "no",
        "Reads": f"{_SITES[first['input_site']]} (`{first['input_site']}`)",
        "Writes": f"{_SITES[first['output_site']]} (`{first['output_site']}`)",
        "Leading positions left out": first["leading_positions"],
        "Dtype": first["dtype"],
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def _is_autoencoder(config: Mapping[str, Any]) -> bool:
    first = next(iter(config["layers"].values()))
    return first["input_site"] == first["output_site"]


def _snippet(config: Mapping[str, Any], repo_id: str | None) -> str:
    name = repo_id or "path/to/this/folder"
    model = f'"{config["base_model"] or "the/model"}"'
    names = ["TranscoderSet", "attach"]
    if config["base_model"] == "builtin":
        model = "builtin_model_path()"
        names.append("builtin_model_path")
    uses = ["replaced = attach(model, transcoders)"]
    if not _is_autoencoder(config):
        names.append("attribute")
        uses.append('graph = attribute(model, transcoders, "The war lasted from 1732 to 17")')
    lines = [
        "from nnsight import TransformersModel",
        f"from nnsight_transcoders import {', '.join(sorted(names))}",
        "",
        f'model = TransformersModel({model}, task="text-generation", dispatch=True)',
        f'transcoders = TranscoderSet.from_pretrained("{name}")',
        "",
        *uses,
    ]
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _metrics(metrics: Mapping[str, Any]) -> str:
    """A table of the layers' metrics and a list of the others."""
    layers = {key: value for key, value in metrics.items() if key.isdecimal()}
    layers = {key: value for key, value in layers.items() if isinstance(value, Mapping)}
    others = {key: value for key, value in metrics.items() if key not in layers}
    if not metrics:
        return ""
    lines = ["## Metrics", ""]
    if layers:
        columns = list(dict.fromkeys(name for values in layers.values() for name in values))
        lines += [f"| layer | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for layer in sorted(layers, key=int):
            values = " | ".join(_number(layers[layer].get(name)) for name in columns)
            lines.append(f"| {layer} | {values} |")
        lines.append("")
    lines += [f"* {name}: {_number(value)}" for name, value in others.items()]
    return "\n".join(lines).rstrip()


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _source(config: Mapping[str, Any]) -> str:
    source = config["provenance"]
    if not source.get("repository"):
        return ""
    commit = f" at `{source['revision']}`" if source.get("revision") else ""
    return (
        f"## Source\n\nConverted from `{source['repository']}`{commit} "
        f"(format {source.get('format')})."
    )

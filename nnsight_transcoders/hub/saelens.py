"""SAELens' layout: a folder per layer with ``cfg.json`` and ``sae_weights.safetensors``.

``W_enc (d_in, F)``, ``W_dec (F, d_out)``, ``b_enc``, ``b_dec`` and, by ``architecture``,
``threshold`` and ``W_skip (d_out, d_in)``, applied as ``x @ W_skip.T``. ``cfg.json`` has ``d_in``,
``d_sae``, ``d_out``, and the hooks under ``metadata`` (older files: beside it). Autoencoders come
in the same layout and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.folds import INPUT_CENTRING, fold_input_centring
from nnsight_transcoders.hub.formats import Evidence, Format, Strength, choose_layers
from nnsight_transcoders.hub.saelens_save import ARCHITECTURES, CONFIG, WEIGHTS, save_saelens
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.hub.tensors import TensorInfo
from nnsight_transcoders.transcoder import InputSite, OutputSite, TranscoderConfig

NAME = "saelens"

_KNOWN = {
    "architecture",
    "d_in",
    "d_out",
    "d_sae",
    "dtype",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
}


def _detect(snapshot: Snapshot) -> Evidence | None:
    found = _folders(snapshot)
    if not found:
        return None
    return Evidence(
        Strength.SAELENS_CONFIG, f"{len(found)} folder(s) with {CONFIG} and {WEIGHTS}: {found[0]}"
    )


def _folders(snapshot: Snapshot) -> list[str]:
    names = set(snapshot.files)
    parents = [str(PurePosixPath(n).parent) for n in snapshot.files if n.split("/")[-1] == WEIGHTS]
    return [folder for folder in parents if _inside(folder, CONFIG) in names]


def _inside(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)


def open_saelens(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open transcoders that SAELens has saved; configs and headers are read.

    Raises:
        CheckpointError: An autoencoder, a hook or a setting that cannot be expressed, or a file
            that is not as it should be.
    """
    folders: dict[int, str] = {}
    raw: dict[int, dict[str, Any]] = {}
    for folder in _folders(snapshot):
        config = snapshot.json(_inside(folder, CONFIG))
        where = f"{_inside(folder, CONFIG)} of {snapshot.where}"
        layer = _layer(_metadata(config, where), where)
        if layer in folders:
            raise CheckpointError(
                f"{snapshot.where} has two transcoders for layer {layer}: {folders[layer]} and "
                f"{folder}; open one of the folders by its own path"
            )
        folders[layer], raw[layer] = folder, config
    if not folders:
        raise CheckpointError(
            f"{snapshot.where} has no {CONFIG} beside a {WEIGHTS}; it has {snapshot.listing()}"
        )
    chosen = choose_layers(folders, layers, snapshot.where)
    files = {layer: _inside(folders[layer], WEIGHTS) for layer in chosen}
    headers = snapshot.headers(list(files.values()))
    plans = {
        layer: _plan(layer, files[layer], headers[files[layer]], raw[layer], snapshot, options)
        for layer in chosen
    }
    folds = [INPUT_CENTRING] if any(plan.fold for plan in plans.values()) else []
    provenance = {"format": NAME, "config": {str(n): raw[n] for n in chosen}, "folds": folds}
    return TensorSource(snapshot, plans, provenance)


def _metadata(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``metadata``, over the keys that older versions kept beside it."""
    metadata = raw.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: its metadata is no mapping")
    keys = ("model_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out")
    return {**{key: raw[key] for key in keys if key in raw}, **(metadata or {})}


def _layer(metadata: Mapping[str, Any], where: str) -> int:
    for key in ("hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out"):
        layer = hooks.hook_layer(metadata.get(key))
        if layer is not None:
            return layer
    raise CheckpointError(f"{where} does not name the layer in metadata.hook_name")


def _plan(
    layer: int,
    file: str,
    header: Mapping[str, TensorInfo],
    raw: Mapping[str, Any],
    snapshot: Snapshot,
    options: Mapping[str, Any],
) -> LayerPlan:
    where = f"{file} of {snapshot.where}"
    jumprelu, skip = _architecture(raw, where)
    metadata = _metadata(raw, where)
    d_in, width, d_out = _widths(header, raw, where)
    reads, writes = _sites(metadata, options, where)
    model = options.get("base_model") or metadata.get("model_name")
    config = TranscoderConfig(
        d_in=d_in,
        d_out=d_out,
        d_transcoder=width,
        layer=layer,
        activation="jumprelu" if jumprelu else "relu",
        input_site=reads,
        output_site=writes,
        skip=skip,
        leading_positions=_leading(metadata, options, where),
        base_model=None if model is None else str(model),
        dtype=header["W_enc"].torch_name,
        source_format=NAME,
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
    )
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    names += (["threshold"] if jumprelu else []) + (["W_skip"] if skip else [])
    refs = {name: TensorRef(file, name, transposed=name == "W_enc") for name in names}
    centred = bool(raw.get("apply_b_dec_to_input"))
    if centred and d_in != d_out:
        raise CheckpointError(
            f"{where} has apply_b_dec_to_input, but reads {d_in} values and writes {d_out}"
        )
    plan = LayerPlan(config, refs, fold=fold_input_centring if centred else None)
    check_header(where, file, header, plan)
    return plan


def _leading(metadata: Mapping[str, Any], options: Mapping[str, Any], where: str) -> int:
    """Leading positions to leave out: the argument, or what our own files say."""
    leading = options.get("leading_positions")
    leading = metadata.get("leading_positions", 0) if leading is None else leading
    if type(leading) is not int:
        raise CheckpointError(f"{where} has leading_positions {leading!r}, expected a number")
    return leading


def _architecture(raw: Mapping[str, Any], where: str) -> tuple[bool, bool]:
    """Whether it is JumpReLU and whether it has a skip path; refuses what cannot be expressed."""
    name = str(raw.get("architecture"))
    if name not in ARCHITECTURES.values():
        raise CheckpointError(
            f"{where} has the architecture {name!r}: an autoencoder or something else, not one of "
            f"the transcoders {', '.join(ARCHITECTURES.values())}"
        )
    normalised = raw.get("normalize_activations")
    if normalised not in (None, "none"):
        raise CheckpointError(
            f"{where} normalises its input ({normalised!r}); fold that into the weights first "
            "(SAELens: fold_activation_norm_scaling_factor)"
        )
    if raw.get("reshape_activations") not in (None, "none"):
        raise CheckpointError(f"{where} reshapes its input ({raw['reshape_activations']!r})")
    if raw.get("apply_b_dec_to_input") not in (None, True, False):
        raise CheckpointError(
            f"{where} has apply_b_dec_to_input={raw['apply_b_dec_to_input']!r}; expected true or "
            "false"
        )
    return next(kind for kind, known in ARCHITECTURES.items() if known == name)


def _widths(
    header: Mapping[str, TensorInfo], raw: Mapping[str, Any], where: str
) -> tuple[int, int, int]:
    """d_in, d_transcoder, d_out of the tensors, which ``cfg.json`` must not contradict."""
    shapes = {name: info.shape for name, info in sorted(header.items())}
    if [len(shapes.get(name, ())) for name in ("W_enc", "W_dec")] != [2, 2]:
        raise CheckpointError(f"{where} has {shapes}; expected W_enc (d_in, F), W_dec (F, d_out)")
    (d_in, width), (_, d_out) = shapes["W_enc"], shapes["W_dec"]
    for key, found in (("d_in", d_in), ("d_sae", width), ("d_out", d_out)):
        if raw.get(key) not in (None, found):
            raise CheckpointError(f"{where} has {key}={found}, but {CONFIG} says {raw[key]!r}")
    return d_in, width, d_out


def _sites(
    metadata: Mapping[str, Any], options: Mapping[str, Any], where: str
) -> tuple[InputSite, OutputSite]:
    """The hooks' sites: TransformerLens' names first, else the Hugging Face module's."""
    reads, writes = options.get("input_site"), options.get("output_site")
    if reads is None:
        names = [metadata[key] for key in ("hook_name", "hf_hook_name") if metadata.get(key)]
        found: list[InputSite] = [hooks.input_site(name, where) for name in names or [None]]
        if len(set(found)) > 1:
            raise CheckpointError(
                f"{where} names two inputs, {names[0]!r} ({found[0]}) and {names[1]!r} "
                f"({found[1]}); settle it with input_site="
            )
        reads = found[0]
    if writes is None:
        writes = hooks.output_site(
            metadata.get("hook_name_out") or metadata.get("hf_hook_name_out"), where
        )
    for key in ("hook_name_out", "hf_hook_name_out"):
        inside, outside = hooks.hook_layer(metadata.get("hook_name")), metadata.get(key)
        other = hooks.hook_layer(outside)
        if None not in (inside, other) and inside != other:
            raise CheckpointError(
                f"{where} reads at layer {inside} and writes at layer {other}: no transcoder of "
                "one MLP"
            )
    return reads, writes


FORMATS = (
    Format(
        name=NAME,
        summary=f"a folder per layer with {CONFIG} and {WEIGHTS}",
        detect=_detect,
        open=open_saelens,
        save=save_saelens,
        options={
            "input_site": "where it reads, over metadata.hook_name",
            "output_site": "where it writes, over metadata.hook_name_out",
            "leading_positions": "positions left out at the start (default 0)",
            "base_model": "the model's Hub id, over metadata.model_name",
        },
    ),
)

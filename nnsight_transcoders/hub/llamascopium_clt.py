"""llamascopium's cross-layer transcoder: one file, layers along the first axis.

``W_E (L, d, F)``, ``b_E (L, F)``; ``W_D.{to} (to + 1, F, d)`` and ``b_D.{to} (d)`` are grouped by
the layer written to, so that source ``s`` writes to ``t`` with ``W_D.{t}[s]``;
``activation_function.log_jumprelu_threshold (L, F)``. Folds as for the per-layer files
(``llamascopium``), with the norm of a feature's decoder taken over all layers it writes to. Read
from llamascopium's ``models/clt.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.assembled import (
    AssembledSource,
    Assembly,
    Build,
    Header,
    Piece,
    check_file,
    scaled,
)
from nnsight_transcoders.hub.circuit_tracer_layers import tensor_shape
from nnsight_transcoders.hub.formats import check_whole, choose_layers
from nnsight_transcoders.hub.llamascopium_parts import (
    CONFIG,
    LOG_THRESHOLD,
    NAME,
    WEIGHTS,
    activation,
    average_key,
    common_fields,
    fold_names,
    gated,
    layer_of,
    scale,
    uses_averages,
)
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.transcoder import TranscoderConfig


def open_cross_layer(
    snapshot: Snapshot,
    folder: str,
    raw: Mapping[str, Any],
    layers: Sequence[int] | None,
    options: Mapping[str, Any],
) -> AssembledSource:
    """Open a cross-layer set of this layout.

    Raises:
        CheckpointError: Hooks that are not those of all layers in order, or files that do not fit.
        InputError: Only some of its layers are asked for.
    """
    where = f"{CONFIG} of {snapshot.where}"
    file = WEIGHTS if folder == "." else f"{folder}/{WEIGHTS}"
    reads, writes = raw.get("hook_points_in"), raw.get("hook_points_out")
    if not isinstance(reads, list) or not isinstance(writes, list) or len(reads) != len(writes):
        raise CheckpointError(f"{where}: hook_points_in and hook_points_out must be equal lists")
    numbers = [layer_of(hook, where) for hook in reads]
    if numbers != list(range(len(reads))) or numbers != [layer_of(hook, where) for hook in writes]:
        raise CheckpointError(f"{where}: hook_points_in and _out must name layers 0, 1, 2 in order")
    check_whole(numbers, choose_layers(numbers, layers, snapshot.where), snapshot.where)
    header = snapshot.header(file)
    config = _config(snapshot, folder, file, raw, header, options)
    plans = {}
    for layer in numbers:
        pieces = _pieces(file, layer, config, raw, where)
        plans[layer] = Assembly(
            config.replace(layer=layer),
            pieces,
            _builder(layer, raw, config.activation, where),
            tuple(range(layer, len(numbers))),
        )
    averages = [average_key(hook) for hook in (*reads, *writes)]
    every = [piece for plan in plans.values() for piece in plan.pieces.values()]
    check_file(f"{file} of {snapshot.where}", header, every, averages)
    provenance = {"format": NAME, "config": dict(raw), "folds": fold_names(raw)}
    return AssembledSource(snapshot, plans, provenance)


def _config(
    snapshot: Snapshot,
    folder: str,
    file: str,
    raw: Mapping[str, Any],
    header: Header,
    options: Mapping[str, Any],
) -> TranscoderConfig:
    where = f"{file} of {snapshot.where}"
    n_layers, d_model, width = tensor_shape(header, "W_E", 3, where)
    if n_layers != len(raw["hook_points_in"]) or raw.get("d_model") not in (None, d_model):
        raise CheckpointError(
            f"{where}: W_E has shape {(n_layers, d_model, width)}, but {CONFIG} has "
            f"{len(raw['hook_points_in'])} layers and d_model={raw.get('d_model')}"
        )
    kind, k = activation(raw, where, options)
    reads = _same({hooks.input_site(hook, where) for hook in raw["hook_points_in"]}, where)
    writes = _same({hooks.output_site(hook, where) for hook in raw["hook_points_out"]}, where)
    return TranscoderConfig(
        d_in=d_model,
        d_out=d_model,
        d_transcoder=width,
        activation=kind,
        k=k,
        input_site=options.get("input_site") or reads,
        output_site=options.get("output_site") or writes,
        cross_layer=True,
        dtype=header["W_E"].torch_name,
        **common_fields(snapshot, folder, raw, options),
    )


def _same(found: set[Any], where: str) -> Any:
    """The one site of all layers."""
    if len(found) > 1:
        raise CheckpointError(f"{where}: its layers differ in their hooks")
    return found.pop()


def _pieces(
    file: str, layer: int, config: TranscoderConfig, raw: Mapping[str, Any], where: str
) -> dict[str, Piece]:
    """What layer ``layer`` needs: its slices, and the scales of the layers it writes to."""
    n_layers, width, d_model = len(raw["hook_points_in"]), config.d_transcoder, config.d_in
    pieces = {
        "W_E": Piece(file, "W_E", (n_layers, d_model, width), layer, features=1),
        "b_E": Piece(file, "b_E", (n_layers, width), layer, features=0),
    }
    if raw.get("use_decoder_bias", True):
        pieces["b_D"] = Piece(file, f"b_D.{layer}", (d_model,))
    if config.activation == "jumprelu":
        pieces[LOG_THRESHOLD] = Piece(file, LOG_THRESHOLD, (n_layers, width), layer, features=0)
    for target in range(layer, n_layers):
        pieces[f"W_D.{target}"] = Piece(
            file, f"W_D.{target}", (target + 1, width, d_model), layer, features=0
        )
    if uses_averages(raw, where):
        names = [raw["hook_points_in"][layer], *raw["hook_points_out"][layer:]]
        pieces |= {average_key(hook): Piece(file, average_key(hook), ()) for hook in names}
    return pieces


def _builder(layer: int, raw: Mapping[str, Any], kind: str, where: str) -> Build:
    def build(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        d_model = tensors["W_E"].shape[0]
        targets = range(layer, len(raw["hook_points_in"]))
        s_in = scale(tensors, raw, raw["hook_points_in"][layer], d_model, where)
        s_out = {
            target: scale(tensors, raw, raw["hook_points_out"][target], d_model, where)
            for target in targets
        }
        stored = torch.stack([tensors[f"W_D.{target}"] for target in targets], dim=1)
        factors = torch.tensor([s_in / s_out[target] for target in targets])
        found = {
            "W_enc": tensors["W_E"].T.contiguous(),
            "b_enc": scaled(tensors["b_E"], 1 / s_in),
            "W_dec": scaled(stored, factors[:, None]),
            "b_dec": scaled(tensors.get("b_D", torch.zeros(d_model)), 1 / s_out[layer]),
        }
        norms = stored.float().flatten(1).norm(dim=1)
        return gated(found, norms, raw, kind, tensors.get(LOG_THRESHOLD), s_in)

    return build

"""Transcoders inside an nnsight model: mounted as modules, applied by a stored edit.

``attach`` gives a copy of the model's envoy. Only the copy carries the edit and the mounted
modules; the wrapped torch module, and every envoy of the original, stay as they are. In a trace of
the copy, ``transcoders[layer]`` has

===================  ==============================================================
``token_index``      (batch, pos): each position in its prompt's own tokens, -1 for padding
``pre_activations``  (batch, pos, d_transcoder)
``features``         (batch, pos, d_transcoder): feature activations
``reconstruction``   (batch, pos, d_model)
``error``            (batch, pos, d_model): MLP output minus reconstruction (not in "replace")
===================  ==============================================================

whose ``.output`` is read and written like that of any module. The same blocks run on a server with
``remote=``: the mounted modules then travel as plain data (``remote_layers.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import nn

from nnsight_transcoders.blocks import LayerSites
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .feature_edits import ablate, scale, set_features, steer
from .feature_rows import FeatureRows
from .mounted import MountedTranscoders
from .replacement import Mode, Replacement, check_layerwise

__all__ = ["ablate", "attach", "attached", "detach", "scale", "set_features", "steer"]


def attach(
    model: Any,
    transcoders: TranscoderSet,
    layers: Sequence[int] | None = None,
    mode: Mode = "replace",
    *,
    features: Mapping[int, Sequence[int]] | None = None,
    sites: Sites | None = None,
) -> Any:
    """An edited nnsight model whose MLPs are accompanied or replaced by transcoders.

    Args:
        model: An nnsight model; it stays as it is. To run on a server (``replaced.trace(prompt,
            remote=True)``), its weights need not be here.
        transcoders: A set that fits it.
        layers: Which of the set's layers to attach (default: all).
        mode: ``"replace"``: the transcoder's output takes the MLP's place and the MLP is not
            computed (except for a set that leaves out leading positions: there the MLP's own output
            stays). ``"replace+error"``: the reconstruction plus its error, so that nothing changes
            until a feature is edited. ``"observe"``: features are computed beside the MLP;
            edits to them have no effect.
        features: Layer -> feature numbers: attach these features only, which reads (and sends to a
            server) their encoder and decoder rows and no other weights. Not with ``"replace"``,
            which needs all features. The helpers take the features' own numbers; the last dimension
            of ``features.output`` has them in the order given.
        sites: The model's sites, where they have to be given by hand.

    Returns:
        The edited copy, of the model's own class. ``trace``, ``generate``, ``session`` and further
        ``edit`` work on it as on the model.

    Raises:
        MismatchError: The set does not fit the model.
        InputError: An unknown mode or layer, a model that already has transcoders attached, a
            set whose features are chosen over all layers together, or ``features`` that cannot be
            had alone.
    """
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; known: {', '.join(get_args(Mode))}")
    if "transcoders" in model.__dict__:
        raise InputError(
            "this model already has transcoders attached: attach to the original model, or "
            "detach() first"
        )
    # A model that has not been loaded may be one that a server has.
    here = getattr(model, "dispatched", True)
    module = hf_module(model, weights=here)
    sites = sites or resolve_sites(module)
    transcoders, numbers = _chosen(transcoders, layers, features, mode)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    check_layerwise(transcoders)
    replacements = _replacements(module, sites, transcoders, mode, numbers, place=here)
    edited = model._shallow_copy()
    edited.transcoders = MountedTranscoders(model, edited, sites, replacements)
    edited._children = [*model._children, edited.transcoders]
    return _with_edit(edited)


def _with_edit(edited: Any) -> Any:
    # nnsight keeps this block as source with the one name that it reads, so that it can travel.
    with edited.edit(inplace=True):
        edited.transcoders.run(edited)
    edited._transcoder_edit = edited._edits[-1]
    return edited


def detach(replaced: Any) -> Any:
    """Take the transcoders off an edited model again; further edits on it stay.

    Returns:
        The same envoy, which now behaves as the model it was made from.

    Raises:
        InputError: It has no transcoders attached.
    """
    edit = replaced.__dict__.pop("_transcoder_edit", None)
    if edit is None:
        raise InputError("this model has no transcoders attached")
    replaced._edits = [other for other in replaced._edits if other is not edit]
    mounted = replaced.__dict__.pop("transcoders")
    replaced._children = [child for child in replaced._children if child is not mounted]
    return replaced


@contextmanager
def attached(
    model: Any,
    transcoders: TranscoderSet,
    layers: Sequence[int] | None = None,
    mode: Mode = "replace",
    *,
    features: Mapping[int, Sequence[int]] | None = None,
    sites: Sites | None = None,
) -> Iterator[Any]:
    """``attach`` for the length of a block, ``detach`` at its end, also after an exception."""
    replaced = attach(model, transcoders, layers, mode, features=features, sites=sites)
    try:
        yield replaced
    finally:
        detach(replaced)


def _chosen(
    transcoders: TranscoderSet,
    layers: Sequence[int] | None,
    features: Mapping[int, Sequence[int]] | None,
    mode: Mode,
) -> tuple[TranscoderSet, Mapping[int, tuple[int, ...]]]:
    """The set to attach, and which features of its layers it has where it has not all."""
    if features is None:
        return (transcoders if layers is None else transcoders.subset(layers)), {}
    if mode == "replace":
        raise InputError(
            "features= attaches some features only, which cannot replace an MLP: use "
            "mode='replace+error' (the rest of the MLP's output stays) or mode='observe'"
        )
    if layers is not None and set(layers) != set(features):
        raise InputError(f"features= names layers {sorted(features)}, layers= {sorted(layers)}")
    rows = FeatureRows(transcoders, features)
    chosen = TranscoderSet(rows, device=transcoders.device, dtype=transcoders.dtype)
    return chosen, rows.numbers


def _replacements(
    module: nn.Module,
    sites: Sites,
    transcoders: TranscoderSet,
    mode: Mode,
    numbers: Mapping[int, Sequence[int]] | None = None,
    *,
    place: bool = True,
) -> dict[int, Replacement]:
    """Per layer, its replacement, by default on the layer's device; the set's modules stay on
    theirs."""
    placed: dict[tuple[int, torch.device], Any] = {}

    def on(layer: int, device: torch.device | None) -> Any:
        part = transcoders[layer]
        if device is None or part.W_enc.device == device:
            return part
        if (layer, device) not in placed:
            placed[layer, device] = copy.deepcopy(part).to(device)
        return placed[layer, device]

    found = {}
    for layer in transcoders.layers:
        here = sites.layers[layer]
        if transcoders.config(layer).input_site == "N0" and here.mlp_norm is None:
            raise InputError(f"layer {layer} reads site N0, but {here.block} has no such norm")
        device = _device(module, here) if place else None
        below = [s for s in transcoders.layers if s < layer] if transcoders.cross_layer else []
        some = (numbers or {}).get(layer)
        found[layer] = Replacement(on(layer, device), [on(s, device) for s in below], mode, some)
    return found


def _device(module: nn.Module, layer: LayerSites) -> torch.device:
    return next(module.get_submodule(layer.block).parameters()).device

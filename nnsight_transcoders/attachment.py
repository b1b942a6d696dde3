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

whose ``.output`` is read and written like that of any module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from torch import Tensor, nn

from .blocks import LayerSites
from .errors import InputError
from .models import hf_module
from .norms import NormSpec, probed_spec
from .replacement import Mode, Replacement, check_layerwise
from .sets import TranscoderSet
from .sites import Sites, resolve_sites


def attach(
    model: Any,
    transcoders: TranscoderSet,
    layers: Sequence[int] | None = None,
    mode: Mode = "replace",
    *,
    sites: Sites | None = None,
) -> Any:
    """An edited nnsight model whose MLPs are accompanied or replaced by transcoders.

    Args:
        model: An nnsight model; it stays as it is.
        transcoders: A set that fits it.
        layers: Which of the set's layers to attach (default: all).
        mode: ``"replace"``: the transcoder's output takes the MLP's place and the MLP is not
            computed (except for a set that leaves out leading positions: there the MLP's own output
            stays). ``"replace+error"``: the reconstruction plus its error, so that nothing changes
            until a feature is edited. ``"observe"``: features are computed beside the MLP;
            edits to them have no effect.
        sites: The model's sites, where they have to be given by hand.

    Returns:
        The edited copy, of the model's own class. ``trace``, ``generate``, ``session`` and further
        ``edit`` work on it as on the model.

    Raises:
        MismatchError: The set does not fit the model.
        InputError: An unknown mode or layer, a model that already has transcoders attached, or a
            set whose features are chosen over all layers together.
    """
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; known: {', '.join(get_args(Mode))}")
    if "transcoders" in model.__dict__:
        raise InputError(
            "this model already has transcoders attached: attach to the original model, or "
            "detach() first"
        )
    module = hf_module(model)
    sites = sites or resolve_sites(module)
    if layers is not None:
        transcoders = transcoders.subset(layers)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    check_layerwise(transcoders)
    replacements = _replacements(module, sites, transcoders, mode)
    edited = model._shallow_copy()
    mounted = nn.ModuleDict({str(layer): r for layer, r in replacements.items()})
    edited.transcoders = Envoy(
        mounted, path=f"{model.path}.transcoders", interleaver=model.interleaver, parent=edited
    )
    edited._children = [*model._children, edited.transcoders]
    splices = [
        _Splice.build(module, sites, layer, replacement)
        for layer, replacement in replacements.items()
    ]
    with edited.edit(inplace=True) as tracer:
        _run_splices(tracer, edited, splices)
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
    sites: Sites | None = None,
) -> Iterator[Any]:
    """``attach`` for the length of a block, ``detach`` at its end, also after an exception."""
    replaced = attach(model, transcoders, layers, mode, sites=sites)
    try:
        yield replaced
    finally:
        detach(replaced)


# -- helpers for use inside a trace --------------------------------------------------------------


def set_features(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    value: float | Tensor,
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: set features to a value.

    Args:
        replaced: What ``attach`` returned.
        layer: Which layer.
        features: Feature index or indices ``(n,)``.
        value: A number, or a tensor that broadcasts to ``(batch, pos, n)``.
        positions: In each prompt's own tokens, padding not counted; negative ones count from its
            end. Default: everywhere.
    """
    _edit_features(replaced, layer, features, positions, lambda old: torch.zeros_like(old) + value)


def ablate(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: set features to zero (see ``set_features``)."""
    _edit_features(replaced, layer, features, positions, torch.zeros_like)


def scale(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    factor: float | Tensor,
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: multiply features by a factor (see ``set_features``)."""
    _edit_features(replaced, layer, features, positions, lambda old: old * factor)


def steer(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    amount: float | Tensor,
    positions: int | Sequence[int] | None = None,
) -> None:
    """Inside a trace: add to features, which adds ``amount`` times their decoder rows to the output
    (see ``set_features``)."""
    _edit_features(replaced, layer, features, positions, lambda old: old + amount)


def _edit_features(
    replaced: Any,
    layer: int,
    features: int | Sequence[int],
    positions: int | Sequence[int] | None,
    change: Callable[[Tensor], Tensor],
) -> None:
    node = _mounted(replaced, layer)
    index = torch.as_tensor([features] if isinstance(features, int) else features)
    width = node._module.d_transcoder
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= width:
        raise InputError(f"layer {layer} has features 0 to {width - 1}, got {index.tolist()}")
    acts = node.features.output
    where = _selected(_own_token_index(node), positions)[..., None]
    index = index.to(acts.device)
    old = acts[..., index]
    edited = acts.clone()
    edited[..., index] = torch.where(where, change(old).to(old.dtype), old)
    node.features.output = edited


def _mounted(replaced: Any, layer: int) -> Any:
    mounted = replaced.__dict__.get("transcoders")
    if mounted is None:
        raise InputError("this model has no transcoders attached: use what attach() returned")
    if str(layer) not in mounted._module:
        raise InputError(f"layers {', '.join(mounted._module)} have transcoders, not {layer}")
    if not replaced.interleaver.interleaving:
        raise InputError("features are edited inside a trace: `with replaced.trace(prompt): ...`")
    return mounted[layer]


def _own_token_index(node: Any) -> Tensor:
    """The token index of the running invoke's rows, once its features have been read.

    ``node.token_index.output`` is the same, but the model is past that location by then.
    """
    mediator = Mediator.current(f"{node.path}.features.output")
    index = node._module.current_token_index
    return mediator.interleaver.batcher.narrow(index, mediator.batch_group)


def _selected(token_index: Tensor, positions: int | Sequence[int] | None) -> Tensor:
    """Mask ``(batch, pos)`` of the positions asked for, in each row's own tokens."""
    if positions is None:
        return token_index >= 0
    wanted = torch.as_tensor([positions] if isinstance(positions, int) else positions)
    wanted = wanted.to(token_index.device).view(1, 1, -1)
    length = token_index.max(dim=1).values.view(-1, 1, 1) + 1
    own = torch.where(wanted < 0, wanted + length, wanted)
    return ((token_index[..., None] == own) & (own >= 0)).any(-1)


# -- the edit ------------------------------------------------------------------------------------


def _replacements(
    module: nn.Module, sites: Sites, transcoders: TranscoderSet, mode: Mode
) -> dict[int, Replacement]:
    """Per layer, its replacement on the layer's device; the set's modules stay on theirs."""
    placed: dict[tuple[int, torch.device], Any] = {}

    def on(layer: int, device: torch.device) -> Any:
        part = transcoders[layer]
        if part.W_enc.device == device:
            return part
        if (layer, device) not in placed:
            placed[layer, device] = copy.deepcopy(part).to(device)
        return placed[layer, device]

    found = {}
    for layer in transcoders.layers:
        device = _device(module, sites.layers[layer])
        below = [s for s in transcoders.layers if s < layer] if transcoders.cross_layer else []
        found[layer] = Replacement(on(layer, device), [on(s, device) for s in below], mode)
    return found


@dataclass(frozen=True)
class _Splice:
    """Where one replacement reads and writes."""

    sites: LayerSites
    replacement: Replacement
    parallel: bool
    norm: NormSpec | None

    @classmethod
    def build(
        cls, module: nn.Module, sites: Sites, layer: int, replacement: Replacement
    ) -> _Splice:
        here = sites.layers[layer]
        norm = None
        if replacement.input_site == "N0":
            if here.mlp_norm is None:
                raise InputError(f"layer {layer} reads site N0, but {here.block} has no such norm")
            norm = probed_spec(module, here.mlp_norm, sites.d_model)
        return cls(here, replacement, sites.parallel, norm)

    def run(self, edited: Any, token_index: Tensor, state: dict[int, tuple]) -> None:
        """Inside a trace: read the site, run the transcoder, put its output in place."""
        node, here = edited.transcoders[self.replacement.layer], self.sites
        residual = None
        if self.replacement.input_site != "N1":
            if self.parallel:
                residual = edited.get(here.block).input
            elif here.mlp_norm is not None:
                residual = edited.get(here.mlp_norm).input
        mlp_in = edited.get(here.mlp_in).input
        shape = (*token_index.shape, mlp_in.shape[-1])
        x = (mlp_in if residual is None else residual).reshape(shape)
        if self.norm is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            x = self.norm.normalise(x.to(wide)).to(x.dtype)
        written = here.mlp_out
        if self.replacement.output_site == "O'" and here.mlp_post_norm is not None:
            written = here.mlp_post_norm
        if self.replacement.needs_mlp:
            output = edited.get(written).output
            y, *others = output if isinstance(output, tuple) else (output,)
            out = node(x, y.reshape(shape), token_index, state, hook=True).reshape(y.shape)
            if self.replacement.mode != "observe":
                edited.get(written).output = (out, *others) if others else out
            return
        out = node(x, None, token_index, state, hook=True).reshape(mlp_in.shape)
        # Between the first and the last part there is at most an elementwise activation, which
        # takes the MLP's own input as well as anything. A part that holds the last one has to run.
        for path in dict.fromkeys((here.mlp_in, here.mlp_out, written)):
            if not written.startswith(f"{path}.") and not here.mlp_out.startswith(f"{path}."):
                edited.get(path).skip(out if path == written else mlp_in)


def _run_splices(tracer: Any, edited: Any, splices: Sequence[_Splice]) -> None:
    """The body of the edit: every layer, at every step of the run."""
    reached, runs = 0, edited.interleaver.counts
    finished = runs.get("result", 0)
    try:
        for step in tracer.iter[:]:
            reached = step
            token_index = _token_index(*edited.inputs)
            state: dict[int, tuple] = {}
            for splice in splices:
                splice.run(edited, token_index, state)
    except OutOfOrderError:
        # How nnsight ends a loop over all steps: the step after the last never comes. At the first
        # step it means that something was not reached, by a run that was not stopped on purpose.
        if reached == 0 and runs.get("result", 0) > finished:
            raise


def _token_index(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """``(batch, pos)``: each position in its own prompt's tokens, -1 for padding."""
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = args[0] if args else kwargs["inputs_embeds"]
    batch, length = ids.shape[:2]
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        return torch.arange(past, past + length, device=ids.device).expand(batch, length)
    index = mask.long().cumsum(-1) - 1
    return index.masked_fill(mask == 0, -1)[:, -length:]


def _device(module: nn.Module, layer: LayerSites) -> torch.device:
    return next(module.get_submodule(layer.block).parameters()).device

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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from .errors import InputError
from .models import hf_module
from .norms import NormSpec, norm_spec
from .sets import TranscoderSet
from .sites import LayerSites, Sites, resolve_sites
from .transcoder import CrossLayerPart, Transcoder

Mode = Literal["replace", "replace+error", "observe"]


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
        InputError: An unknown mode or layer, or a model that already has transcoders attached.
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
    replacements = {
        layer: Replacement(transcoders, layer, mode).to(_device(module, sites.layers[layer]))
        for layer in transcoders.layers
    }
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
    where = _selected(node.token_index.output, positions)[..., None]
    acts = node.features.output
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


def _selected(token_index: Tensor, positions: int | Sequence[int] | None) -> Tensor:
    """Mask ``(batch, pos)`` of the positions asked for, in each row's own tokens."""
    if positions is None:
        return token_index >= 0
    wanted = torch.as_tensor([positions] if isinstance(positions, int) else positions)
    wanted = wanted.to(token_index.device).view(1, 1, -1)
    length = token_index.max(dim=1).values.view(-1, 1, 1) + 1
    own = torch.where(wanted < 0, wanted + length, wanted)
    return ((token_index[..., None] == own) & (own >= 0)).any(-1)


# -- the mounted modules and the edit ------------------------------------------------------------


class Served(nn.Module):
    """Passes a value on, so that it has a location in the model's tree."""

    def forward(self, value: Tensor) -> Tensor:
        return value


class Replacement(nn.Module):
    """One layer's transcoder as a module of the model (see this module's docstring).

    Args:
        transcoders: The set; a cross-layer layer needs the parts below it too.
        layer: Which layer.
        mode: See ``attach``.
    """

    transcoder: Transcoder | CrossLayerPart
    token_index: Served
    pre_activations: Served
    features: Served
    reconstruction: Served
    error: Served

    def __init__(self, transcoders: TranscoderSet, layer: int, mode: Mode) -> None:
        super().__init__()
        own = transcoders[layer]
        self.layer, self.mode = layer, mode
        self.d_transcoder = own.config.d_transcoder
        self.leading_positions = own.config.leading_positions
        self.input_site, self.output_site = own.config.input_site, own.config.output_site
        self.transcoder = own
        below = [transcoders[s] for s in transcoders.layers if s < layer] if _crosses(own) else []
        self.below = nn.ModuleList(below)
        for name in ("token_index", "pre_activations", "features", "reconstruction", "error"):
            setattr(self, name, Served())

    @property
    def needs_mlp(self) -> bool:
        """Whether the MLP's own output is wanted."""
        return self.mode != "replace" or self.leading_positions > 0

    def forward(
        self, x: Tensor, y: Tensor | None, token_index: Tensor, state: dict[int, tuple]
    ) -> Tensor:
        """Features of ``x (batch, pos, d_in)`` and what to put in the MLP's place.

        Args:
            x: Input-site value.
            y: Output-site value ``(batch, pos, d_out)``, or None where the MLP is not computed.
            token_index: ``(batch, pos)``.
            state: Layer -> (features as computed, features after edits) of this forward pass; the
                layer adds its own.
        """
        token_index = self.token_index(token_index)
        left_out = (token_index < self.leading_positions)[..., None]
        clean = self._features(self.transcoder.pre_activations(x), left_out)
        clean_decoded = self._decode(clean, x, state, 0) if self.mode != "replace" else None
        pre = self.pre_activations(self.transcoder.pre_activations(x))
        acts = self.features(self._features(pre, left_out))
        state[self.layer] = (clean, acts)
        reconstruction = self.reconstruction(self._decode(acts, x, state, 1).to(x.dtype))
        if y is None:
            # A copy: some models add to the MLP's output in place (Falcon).
            return reconstruction.clone()
        if clean_decoded is None:
            return torch.where(left_out, y, reconstruction)
        error = self.error(y - clean_decoded.to(y.dtype))
        return y if self.mode == "observe" else reconstruction + error

    def _features(self, pre: Tensor, left_out: Tensor) -> Tensor:
        acts = self.transcoder.activation(pre)
        return acts.masked_fill(left_out, 0) if self.leading_positions else acts

    def _decode(self, acts: Tensor, x: Tensor, state: dict[int, tuple], which: int) -> Tensor:
        if isinstance(self.transcoder, Transcoder):
            return self.transcoder.decode(acts, x)
        assert isinstance(self.transcoder, CrossLayerPart)
        out = self.transcoder.contribution(acts, self.layer)
        out = out + self.transcoder.b_dec + self.transcoder.skip(x)
        for part in self.below:
            assert isinstance(part, CrossLayerPart)
            out = out + part.contribution(state[part.config.layer][which], self.layer)
        return out


def _crosses(module: nn.Module) -> bool:
    return isinstance(module, CrossLayerPart)


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
            part = module.get_submodule(here.mlp_norm)
            device, dtype = _device(module, here), next(module.parameters()).dtype
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(4, sites.d_model, generator=generator).to(device, dtype)
            norm = norm_spec(part, here.mlp_norm, probe)
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
            x = self.norm.normalise(x.float()).to(x.dtype)
        written = here.mlp_out
        if self.replacement.output_site == "O'" and here.mlp_post_norm is not None:
            written = here.mlp_post_norm
        if self.replacement.needs_mlp:
            y = edited.get(written).output
            out = node(x, y.reshape(shape), token_index, state, hook=True)
            if self.replacement.mode != "observe":
                edited.get(written).output = out.reshape(y.shape)
            return
        out = node(x, None, token_index, state, hook=True).reshape(mlp_in.shape)
        # Between the first and the last part there is at most an elementwise activation, which
        # takes the MLP's own input as well as anything.
        for path in dict.fromkeys((here.mlp_in, here.mlp_out, written)):
            edited.get(path).skip(out if path == written else mlp_in)


def _run_splices(tracer: Any, edited: Any, splices: Sequence[_Splice]) -> None:
    """The body of the edit: every layer, at every step of the run."""
    reached = 0
    try:
        for step in tracer.iter[:]:
            reached = step
            token_index = _token_index(*edited.inputs)
            state: dict[int, tuple] = {}
            for splice in splices:
                splice.run(edited, token_index, state)
    except OutOfOrderError:
        # How nnsight ends a loop over all steps: the step after the last never comes. At the first
        # step it means that something was not reached.
        if reached == 0:
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

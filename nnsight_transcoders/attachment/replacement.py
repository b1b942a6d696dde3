"""The module that ``attach`` mounts for a layer: its transcoder, with a location for every value.

Torch only, so that it can travel to a server: where it reads and writes in a model is the business
of ``splices.py`` here, and of ``remote_layers.py`` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, cross_layer_decode

if TYPE_CHECKING:
    from nnsight_transcoders.sets import TranscoderSet

Mode = Literal["replace", "replace+error", "observe"]


def check_layerwise(transcoders: TranscoderSet) -> None:
    """Check that each layer's features can be known when that layer runs.

    Raises:
        InputError: They are chosen over all layers together.
    """
    if transcoders.joint_k is not None:
        raise InputError(
            "this set keeps the k features that write the most over all layers together "
            "(activation 'jointtopk'): while an early layer runs, the features of later layers "
            "are not known yet, so it cannot be attached to a running model. attribute() and "
            "verify() work: they encode a finished run"
        )


def check_transcodes(transcoders: TranscoderSet) -> None:
    """Check that a set can be part of a circuit: that it maps MLP inputs to outputs.

    Raises:
        InputError: It is a set of sparse autoencoders.
    """
    for layer in transcoders.layers:
        config = transcoders.config(layer)
        if config.is_autoencoder:
            raise InputError(
                f"layer {layer}'s is a sparse autoencoder: it reads the site that it writes "
                f"({config.output_site}), so it says nothing of how the MLP computes. Circuits "
                "need transcoders; attach and evaluate take autoencoders too"
            )


class Served(nn.Module):
    """Passes a value on, so that it has a location in the model's tree.

    As a copy, since autograd may need the original (ReLU's output) after an edit in place.
    """

    def forward(self, value: Tensor) -> Tensor:
        return value.clone()


class Replacement(nn.Module):
    """One layer's transcoder as a module of the model (see ``attachment.py``).

    Args:
        own: The layer's transcoder.
        below: Of a cross-layer transcoder, the parts of the layers below.
        mode: See ``attach``.
        numbers: Where ``own`` holds some of a layer's features only: their numbers in it.
    """

    transcoder: Transcoder | CrossLayerPart
    token_index: Served
    pre_activations: Served
    features: Served
    reconstruction: Served
    error: Served
    current_token_index: Tensor

    def __init__(
        self,
        own: Transcoder | CrossLayerPart,
        below: Sequence[CrossLayerPart],
        mode: Mode,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.mode = own.config.layer, mode
        self.d_transcoder = own.config.d_transcoder
        self.feature_numbers = None if numbers is None else tuple(numbers)
        self.leading_positions = own.config.leading_positions
        self.input_site, self.output_site = own.config.input_site, own.config.output_site
        self.transcoder, self.below = own, nn.ModuleList(below)
        for name in ("token_index", "pre_activations", "features", "reconstruction", "error"):
            setattr(self, name, Served())

    @property
    def needs_mlp(self) -> bool:
        """Whether the MLP's own output is wanted."""
        return self.mode != "replace" or self.leading_positions > 0 or self.reads_output

    @property
    def reads_output(self) -> bool:
        """Whether it is a sparse autoencoder: it reads the MLP's output."""
        return self.input_site == self.output_site

    def columns(self, features: int | Sequence[int] | Tensor) -> Tensor:
        """Feature numbers as indices ``(n,)`` into the last dimension of ``features.output``.

        Raises:
            InputError: One that is not there.
        """
        wanted = torch.as_tensor([features] if isinstance(features, int) else features)
        known = self.feature_numbers
        if known is None:
            found, there = wanted, f"features 0 to {self.d_transcoder - 1}"
            missing = not len(wanted) or bool(((wanted < 0) | (wanted >= self.d_transcoder)).any())
        else:
            there = f"only the features {list(known)} attached"
            missing = not len(wanted) or not set(wanted.tolist()) <= set(known)
            found = wanted if missing else torch.tensor([known.index(i) for i in wanted.tolist()])
        if missing:
            raise InputError(f"layer {self.layer} has {there}, got {wanted.tolist()}")
        return found

    def forward(
        self, x: Tensor, y: Tensor | None, token_index: Tensor, state: dict[int, tuple]
    ) -> Tensor:
        """Features of ``x (batch, pos, d_in)`` and what to put in the MLP's place.

        Args:
            x: Input-site value.
            y: Output-site value ``(batch, pos, d_out)``, or None where the MLP is not computed.
            token_index: ``(batch, pos)``.
            state: Layer -> (features as computed, features after edits) of this forward pass; the
                layer adds its own. The former only where the error is wanted.
        """
        token_index = self.current_token_index = self.token_index(token_index)
        computed = self.transcoder.pre_activations(x)
        clean = clean_decoded = None
        if self.mode != "replace":
            clean = self.activations(computed, token_index)
            clean_decoded = self.decode(clean, x, {k: v[0] for k, v in state.items()})
        acts = self.features(self.activations(self.pre_activations(computed), token_index))
        edited = {k: v[1] for k, v in state.items()}
        reconstruction = self.reconstruction(self.decode(acts, x, edited))
        state[self.layer] = (clean, acts)
        if y is None:
            # A copy: some models add to the MLP's output in place (Falcon).
            return reconstruction.to(x.dtype, copy=True)
        error = None
        if clean_decoded is not None:
            error = self.error(difference(y, clean_decoded))
        return self.written(y, reconstruction, error, token_index)

    def activations(self, pre: Tensor, token_index: Tensor) -> Tensor:
        """Features of pre-activations ``(batch, pos, d_transcoder)``; none at positions that the
        set leaves out."""
        acts = self.transcoder.activation(pre)
        if not self.leading_positions:
            return acts
        return acts.masked_fill((token_index < self.leading_positions)[..., None], 0)

    def decode(self, acts: Tensor, x: Tensor, earlier: Mapping[int, Tensor]) -> Tensor:
        """The reconstruction from the layer's features and, of a cross-layer transcoder, those of
        the layers below."""
        if isinstance(self.transcoder, Transcoder):
            return self.transcoder.decode(acts, x)
        assert isinstance(self.transcoder, CrossLayerPart)
        below = [part for part in self.below if isinstance(part, CrossLayerPart)]
        features = {p.config.layer: earlier[p.config.layer].to(acts.device) for p in below}
        parts = [*below, self.transcoder]
        return cross_layer_decode(self.transcoder, parts, {**features, self.layer: acts}, x)

    def written(
        self, y: Tensor, reconstruction: Tensor, error: Tensor | None, token_index: Tensor
    ) -> Tensor:
        """What takes the place of the MLP's output ``y``; the error is None in "replace"."""
        if error is None:
            left_out = (token_index < self.leading_positions)[..., None]
            return torch.where(left_out, y, reconstruction.to(y.dtype))
        return y if self.mode == "observe" else (reconstruction.to(error.dtype) + error).to(y.dtype)


def difference(y: Tensor, reconstruction: Tensor) -> Tensor:
    """The error: wide enough that in half precision, too, what it is added to rounds back to the
    MLP's own output."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.to(wide) - reconstruction.to(wide)

"""The module that ``attach`` mounts for a layer: its transcoder, with a location for every value.

Torch only: where it reads and writes in a model is ``attachment.py``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import InputError
from .sets import TranscoderSet
from .transcoder import CrossLayerPart, Transcoder, cross_layer_decode

Mode = Literal["replace", "replace+error", "observe"]


def check_layerwise(transcoders: TranscoderSet) -> None:
    """Check that each layer's features can be known when that layer runs.

    Raises:
        InputError: They are chosen over all layers together.
    """
    for layer in transcoders.layers:
        if transcoders.config(layer).activation == "jointtopk":
            raise InputError(
                "this set keeps the k features that write the most over all layers together "
                "(activation 'jointtopk'): while an early layer runs, the features of later layers "
                "are not known yet, so it cannot be attached to a running model. attribute() and "
                "verify() work: they encode a finished run"
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
    """

    transcoder: Transcoder | CrossLayerPart
    token_index: Served
    pre_activations: Served
    features: Served
    reconstruction: Served
    error: Served
    current_token_index: Tensor

    def __init__(
        self, own: Transcoder | CrossLayerPart, below: Sequence[CrossLayerPart], mode: Mode
    ) -> None:
        super().__init__()
        self.layer, self.mode = own.config.layer, mode
        self.d_transcoder = own.config.d_transcoder
        self.leading_positions = own.config.leading_positions
        self.input_site, self.output_site = own.config.input_site, own.config.output_site
        self.transcoder, self.below = own, nn.ModuleList(below)
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
                layer adds its own. The former only where the error is wanted.
        """
        token_index = self.current_token_index = self.token_index(token_index)
        left_out = (token_index < self.leading_positions)[..., None]
        computed = self.transcoder.pre_activations(x)
        clean = clean_decoded = None
        if self.mode != "replace":
            clean = self._features(computed, left_out)
            clean_decoded = self._decode(clean, x, state, 0)
        acts = self.features(self._features(self.pre_activations(computed), left_out))
        state[self.layer] = (clean, acts)
        reconstruction = self.reconstruction(self._decode(acts, x, state, 1))
        if y is None:
            # A copy: some models add to the MLP's output in place (Falcon).
            return reconstruction.to(x.dtype, copy=True)
        if clean_decoded is None:
            return torch.where(left_out, y, reconstruction.to(y.dtype))
        # Wide enough that in half precision, too, the sum rounds back to the MLP's own output.
        wide = torch.promote_types(y.dtype, torch.float32)
        error = self.error(y.to(wide) - clean_decoded.to(wide))
        return y if self.mode == "observe" else (reconstruction.to(wide) + error).to(y.dtype)

    def _features(self, pre: Tensor, left_out: Tensor) -> Tensor:
        acts = self.transcoder.activation(pre)
        return acts.masked_fill(left_out, 0) if self.leading_positions else acts

    def _decode(self, acts: Tensor, x: Tensor, state: dict[int, tuple], which: int) -> Tensor:
        if isinstance(self.transcoder, Transcoder):
            return self.transcoder.decode(acts, x)
        assert isinstance(self.transcoder, CrossLayerPart)
        below = [part for part in self.below if isinstance(part, CrossLayerPart)]
        earlier = {p.config.layer: state[p.config.layer][which].to(acts.device) for p in below}
        parts = [*below, self.transcoder]
        return cross_layer_decode(self.transcoder, parts, {**earlier, self.layer: acts}, x)

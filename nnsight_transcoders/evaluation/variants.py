"""The replaced variants of a model that ``evaluate`` compares: which set runs in which layers.

An ablated MLP is one whose transcoder has no active feature and writes a constant, so that it goes
through the same edit as the transcoders do, and leaves out the same leading positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from nnsight_transcoders.attachment.edit import attached
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import Transcoder, TranscoderConfig

from .layer_sums import LayerSums

#: What takes the MLPs' place: reconstructions, zero, or the mean output.
Kind = Literal["replaced", "zero", "mean"]


@dataclass(frozen=True)
class Variant:
    """One variant of a model.

    Attributes:
        kind: What takes the MLPs' place.
        layer: In which layer; None for all of the set's.
        transcoders: The set that is attached.
        isolated: The layer whose reconstruction alone takes the MLP's place, where the whole set
            has to run for it (cross-layer sets).
    """

    kind: Kind
    layer: int | None
    transcoders: TranscoderSet
    isolated: int | None = None

    def attached(self, model: Any, sites: Sites) -> Any:
        """A context with the edited model."""
        mode = "replace" if self.isolated is None else "replace+error"
        return attached(model, self.transcoders, mode=mode, sites=sites)

    @property
    def start(self) -> int:
        """Of an isolated layer, the first position that its set does not leave out."""
        layers = self.transcoders.layers if self.isolated is None else [self.isolated]
        return self.transcoders.config(layers[0]).leading_positions


def set_variants(
    transcoders: TranscoderSet, sums: Mapping[int, LayerSums], each_layer: bool
) -> Iterator[Variant]:
    """Every variant of a set: together first, then layer by layer if wanted.

    Args:
        transcoders: The set.
        sums: Its layers' sums, for the mean outputs.
        each_layer: Whether the layers are wanted one by one.
    """
    for kind in get_args(Kind):
        chosen = transcoders if kind == "replaced" else _constant(transcoders, sums, kind)
        yield Variant(kind, None, chosen)
        for layer in transcoders.layers if each_layer and len(transcoders) > 1 else ():
            if chosen.cross_layer:
                yield Variant(kind, layer, chosen, isolated=layer)
            else:
                yield Variant(kind, layer, chosen.subset([layer]))


def _constant(
    transcoders: TranscoderSet, sums: Mapping[int, LayerSums], kind: Kind
) -> TranscoderSet:
    """A set that writes a constant whatever it reads."""
    modules = {}
    for layer, found in sums.items():
        given = transcoders.config(layer)
        config = TranscoderConfig(
            d_in=given.d_out,
            d_out=given.d_out,
            d_transcoder=1,
            layer=layer,
            output_site=given.output_site,
            leading_positions=given.leading_positions,
        )
        module = Transcoder(config)
        if kind == "mean":
            module.b_dec.data.copy_(found.mean)
        modules[layer] = module.requires_grad_(False)
    return TranscoderSet.from_transcoders(modules)


def on_device_of(transcoders: TranscoderSet, module: nn.Module, sites: Sites) -> TranscoderSet:
    """The set on the model's device, if that is one: else every attachment would copy it there."""
    blocks = (module.get_submodule(layer.block) for layer in sites.layers)
    devices = {parameter.device for block in blocks for parameter in block.parameters()}
    same = len(devices) > 1 or transcoders.device in devices
    return transcoders if same else transcoders.to(devices.pop())

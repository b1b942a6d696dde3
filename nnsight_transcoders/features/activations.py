"""The active features of batches of token ids: the model runs once, each layer is encoded sparsely.

Only the values at the transcoders' input sites are read, and the model stops behind the last of
them. Legend: B contexts, T positions, n active entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.active import CHUNK_ELEMENTS, largest_per_position
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.site_stream import Where, stream_site_values
from nnsight_transcoders.sites import Sites

from .entries import SparseActivations

#: Of one layer's active entries: the row, the feature, the activation, each ``(n,)``.
Encoded = tuple[Tensor, Tensor, Tensor]


class ActivationReader:
    """Reads the active features of chosen layers.

    Args:
        model: An nnsight model.
        sites: Its sites.
        transcoders: Its set; the chosen layers are loaded and kept.
        layers: Which layers; their features are counted through in this order.
        remote: Where the model runs, if not here.

    Raises:
        InputError: Some layers only of a set whose features are chosen over all layers together.
    """

    def __init__(
        self,
        model: Any,
        sites: Sites,
        transcoders: TranscoderSet,
        layers: Sequence[int],
        remote: Remote | None = None,
    ) -> None:
        self._set, self.layers = transcoders, tuple(layers)
        if transcoders.joint_k is not None and self.layers != transcoders.layers:
            raise InputError(
                "this set chooses its features over all layers together: collect all of them"
            )
        self._decoder_norms: dict[int, Tensor] = {}
        self._model, self._sites, self._remote = model, sites, remote
        self._wanted: list[Where] = [(n, transcoders.config(n).input_site) for n in self.layers]

    @property
    def leading_positions(self) -> int:
        """Leading positions that any of the layers leaves out."""
        return max(self._set.config(layer).leading_positions for layer in self.layers)

    def __call__(self, ids: Tensor, measured: Tensor) -> SparseActivations:
        """What is active at the measured positions.

        Args:
            ids: ``(B, T)``.
            measured: ``(B, T)`` booleans.
        """
        (found,) = self.stream([(ids, measured)])
        return found

    def stream(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[SparseActivations]:
        """The same of many batches, in order. A remote model's requests are sent ahead, so that it
        runs while what came back is encoded here; a batch that was lost is asked for again.

        Args:
            batches: Token ids and measured positions of each.
        """
        masks: deque[Tensor] = deque()

        def asked() -> Iterator[tuple[Tensor, Tensor]]:
            for ids, measured in batches:
                masks.append(measured)
                yield ids, measured

        for read in stream_site_values(
            self._model, self._wanted, asked(), sites=self._sites, remote=self._remote
        ):
            values = {layer: x for (layer, _), x in read.items()}
            yield self._active(values, masks.popleft())

    @torch.no_grad()
    def _active(self, values: Mapping[int, Tensor], measured: Tensor) -> SparseActivations:
        found = [self._encode(layer, values[layer]) for layer in self.layers]
        if self._set.joint_k is not None:
            found = self._chosen(found, self._set.joint_k)
        widths = torch.tensor([self._set.config(layer).d_transcoder for layer in self.layers])
        offsets = (widths.cumsum(0) - widths).tolist()
        row = torch.cat([row for row, _, _ in found])
        context, position = (at[row] for at in measured.nonzero(as_tuple=True))
        feature = torch.cat([i + start for (_, i, _), start in zip(found, offsets, strict=True)])
        return SparseActivations(context, position, feature, torch.cat([v for *_, v in found]))

    def _encode(self, layer: int, x: Tensor) -> Encoded:
        """What is active in ``x (rows, d_model)``, on the CPU."""
        module = self._set[layer]
        parts, start = [], 0
        for rows in x.split(max(1, CHUNK_ELEMENTS // module.config.d_transcoder)):
            activation = module.encode(rows.to(module.W_enc.device))
            row, index = activation.nonzero(as_tuple=True)
            parts.append(((row + start).cpu(), index.cpu(), activation[row, index].float().cpu()))
            start += len(rows)
        row, index, value = (torch.cat(column) for column in zip(*parts, strict=True))
        return row, index, value

    def _chosen(self, found: list[Encoded], k: int) -> list[Encoded]:
        """Of each position the k features that write the most, over all layers."""
        scores = [
            value * self._norms(layer)[index]
            for layer, (_, index, value) in zip(self.layers, found, strict=True)
        ]
        kept = largest_per_position(torch.cat([row for row, *_ in found]), torch.cat(scores), k)
        masks = kept.split([len(score) for score in scores])
        return [
            (row[mask], index[mask], value[mask])
            for (row, index, value), mask in zip(found, masks, strict=True)
        ]

    def _norms(self, layer: int) -> Tensor:
        if layer not in self._decoder_norms:
            self._decoder_norms[layer] = self._set[layer].decoder_norms().cpu()
        return self._decoder_norms[layer]

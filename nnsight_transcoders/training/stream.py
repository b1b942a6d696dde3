"""Values at the sites of several layers for training: which positions, and pairs of them by layer.

``site_stream.py`` reads them, here or from a server: one forward pass per batch, which stops after
the last site, with only the kept positions copied or sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.site_stream import Where, stream_site_values
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import InputSite, OutputSite


class SiteReader:
    """Reads the values at the input and output sites of some layers.

    Args:
        model: An nnsight model.
        sites: Its sites.
        layers: Which layers.
        input_site: Read at each layer.
        output_site: Read at each layer too.
        remote: Where the model runs, if not here.

    Raises:
        InputError: A layer that does not exist.
    """

    def __init__(
        self,
        model: Any,
        sites: Sites,
        layers: Sequence[int],
        input_site: InputSite,
        output_site: OutputSite | InputSite,
        *,
        remote: Any = False,
    ) -> None:
        self._model, self._sites, self._remote = model, sites, remote or None
        self.layers = tuple(sorted(layers))
        for layer in self.layers:
            if not 0 <= layer < sites.n_layers:
                raise InputError(
                    f"the model has layers 0 to {sites.n_layers - 1}; there is no layer {layer}"
                )
        self._pair = (input_site, output_site)

    def device(self, layer: int) -> torch.device:
        """Where the layer's values are."""
        if self._remote is not None:
            return torch.device("cpu")
        block = hf_module(self._model).get_submodule(self._sites.layers[layer].block)
        return next(block.parameters()).device

    def __call__(
        self, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Input and output values of each layer at the kept positions, batch by batch.

        Args:
            batches: Token ids ``(rows, pos)``, and which positions are wanted.

        Yields:
            Layer -> ``(n, d_model)`` twice, in the model's dtype; the same tensor twice for an
            autoencoder.
        """
        read, written = self._pair
        wanted: list[Where] = [
            (layer, site) for layer in self.layers for site in dict.fromkeys(self._pair)
        ]
        with torch.no_grad():
            for found in stream_site_values(
                self._model, wanted, batches, sites=self._sites, remote=self._remote
            ):
                yield {n: (found[n, read], found[n, written]) for n in self.layers}


def kept_positions(
    ids: Tensor, lengths: Sequence[int], leading: int, special: frozenset[int]
) -> Tensor:
    """``(rows, pos)``: neither padding, nor leading, nor a special token."""
    positions = torch.arange(ids.shape[1])
    kept = (positions >= leading) & (positions < torch.tensor(lengths)[:, None])
    if special:
        kept &= ~torch.isin(ids, torch.tensor(sorted(special)))
    return kept


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Rows of token ids as one tensor, shorter ones padded at their end.

    The attention is causal, so that nothing in a row sees its padding.
    """
    length = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])

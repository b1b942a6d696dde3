"""``verify`` of a set on a remote model: the model runs there, the transcoders here.

One request per batch brings every layer's values and the cross-entropy; features and
reconstructions are computed here. What a layer alone costs follows from sending its reconstruction
up, many layers as rows of one batch. All layers at once is a chain, since what a layer reads
depends on what was put in the place of those below: a small set travels and the chain runs there;
of a larger one each layer's reconstructions go up in turn, one request per layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.attachment.edit import attached
from nnsight_transcoders.attachment.replacement import difference
from nnsight_transcoders.remote.calls import call
from nnsight_transcoders.remote.payload import megabytes
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.site_stream import Where, output_path, site_reads
from nnsight_transcoders.sites import Sites

from .fit_job import entropies, values_and_entropies, written_values
from .fit_sums import FitSums, FitTotals

logger = logging.getLogger(__name__)

#: A set up to this share of ``max_bytes`` is sent, with each batch.
SENT_SHARE = 1 / 8
#: Rows of one request for single layers.
ROWS = 64


class RemoteMeasurement:
    """Runs a set against a remote model.

    Args:
        model: The nnsight model.
        transcoders: The set.
        sites: The model's sites.
        server: Where it is.
        singles: Layers to replace alone.
    """

    def __init__(
        self,
        model: Any,
        transcoders: TranscoderSet,
        sites: Sites,
        server: RemoteServer,
        singles: Sequence[int],
    ) -> None:
        self._model, self._set, self._sites = model, transcoders, sites
        self._server, self._singles = server, list(singles)
        self._configs = {layer: transcoders.config(layer) for layer in transcoders.layers}
        self._joint = transcoders.joint_k is not None
        size = _bytes(transcoders)
        self._sent = not self._joint and size <= server.max_bytes * SENT_SHARE
        if not self._joint:
            how = "travels" if self._sent else "stays here, one request per layer and batch"
            logger.info("all layers at once: the set (%s) %s", megabytes(size), how)

    def measure(self, batches: Sequence[Tensor], verbose: bool = False) -> FitTotals:
        """Run batches of token ids ``(n, T)``."""
        found = FitTotals(
            {layer: FitSums(self._sites.d_model) for layer in self._configs},
            0.0,
            0.0,
            dict.fromkeys(self._singles, 0.0),
        )
        for ids in tqdm(batches, desc="verify", disable=not verbose, leave=False):
            x, y, ce = self._clean(ids)
            features = self._set.encode(x)
            made = {layer: self._made(layer, features, x[layer], y[layer]) for layer in x}
            self._add(found.sums, features, y, made)
            found.ce += ce
            for layer, single in self._each_alone(ids, made):
                found.ce_single[layer] += single
            found.ce_replaced += self._all(ids, made)
        return found

    def _call(self, ids: Tensor, function: Any, *args: Any, stop: bool = False) -> Any:
        return call(self._model, ids, function, *args, remote=self._server, stop=stop)

    def _clean(self, ids: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], float]:
        wanted: list[Where] = []
        for layer, config in self._configs.items():
            wanted.append((layer, config.input_site))
            wanted.append((layer, config.output_site))
        pairs, reads = site_reads(self._model, self._sites, wanted, ids.shape)
        args = (values_and_entropies, reads, self._server.dtype, ids)
        values, ce = self._call(ids, *args)
        found = dict(zip(pairs, values, strict=True))
        x = {layer: found[layer, c.input_site] for layer, c in self._configs.items()}
        y = {layer: found[layer, c.output_site] for layer, c in self._configs.items()}
        return x, y, float(ce.sum())

    # -- here ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _made(self, layer: int, features: Mapping[int, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The layer's reconstruction; the MLP's own output at positions that the set leaves out."""
        made = self._set.decode(layer, features, x).to(y.device, y.dtype)
        start = self._configs[layer].leading_positions
        return torch.cat([y[:, :start], made[:, start:]], dim=1)

    def _add(
        self,
        sums: Mapping[int, FitSums],
        features: Mapping[int, Tensor],
        y: Mapping[int, Tensor],
        made: Mapping[int, Tensor],
    ) -> None:
        for layer, acts in features.items():
            start = self._configs[layer].leading_positions
            output, reconstruction = y[layer][:, start:], made[layer][:, start:]
            error = difference(output, reconstruction)
            active = int(acts[:, start:].count_nonzero())
            sums[layer].add(output.flatten(0, 1), error.flatten(0, 1), active)

    # -- there -----------------------------------------------------------------------------------

    def _written(self, layer: int, value: Tensor, row: int = 0) -> dict[str, Any]:
        path = output_path(self._sites, layer, self._configs[layer].output_site)
        return {"path": path, "value": value, "row": row}

    def _each_alone(self, ids: Tensor, made: Mapping[int, Tensor]) -> Iterator[tuple[int, float]]:
        """Cross-entropy with each layer alone replaced, several layers in one batch."""
        n, at_once = len(ids), max(1, ROWS // len(ids))
        for start in range(0, len(self._singles), at_once):
            layers = self._singles[start : start + at_once]
            rows = ids.repeat(len(layers), 1)
            written = [self._written(one, made[one], i * n) for i, one in enumerate(layers)]
            found = self._call(rows, entropies, written, rows).view(len(layers), n).sum(1)
            yield from zip(layers, found.tolist(), strict=True)

    def _all(self, ids: Tensor, made: Mapping[int, Tensor]) -> float:
        """Cross-entropy with all layers replaced."""
        if self._joint:
            # Chosen over a finished run (``joint_fit.py``): the reconstructions are those of it.
            written = [self._written(layer, made[layer]) for layer in made]
        elif self._sent:
            with attached(self._model, self._set, sites=self._sites) as replaced:
                found = call(replaced, ids, entropies, [], ids, remote=self._server)
            return float(found.sum())
        else:
            written = self._chain(ids)
        return float(self._call(ids, entropies, written, ids).sum())

    def _chain(self, ids: Tensor) -> list[dict[str, Any]]:
        """What each layer writes where all below it are replaced."""
        written: list[dict[str, Any]] = []
        features: dict[int, Tensor] = {}
        for layer, config in self._configs.items():
            wanted: list[Where] = [(layer, config.input_site)]
            if config.leading_positions:
                wanted.append((layer, config.output_site))
            pairs, reads = site_reads(self._model, self._sites, wanted, ids.shape)
            args = (written_values, written, reads, self._server.dtype)
            found = dict(zip(pairs, self._call(ids, *args, stop=True), strict=True))
            x = found[layer, config.input_site]
            features |= self._set.encode({layer: x})
            y = found.get((layer, config.output_site), x)
            written.append(self._written(layer, self._made(layer, features, x, y)))
        return written


def _bytes(transcoders: TranscoderSet) -> int:
    total = 0
    for layer in transcoders.layers:
        config = transcoders.config(layer)
        width = config.d_in + len(transcoders.targets(layer)) * config.d_out
        item = torch.empty(0, dtype=transcoders.dtype or getattr(torch, config.dtype)).itemsize
        total += config.d_transcoder * width * item
    return total

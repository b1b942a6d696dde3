"""The values at all of a layer's sites on a text, read in one trace per batch.

``verify`` needs them only where a set does not fit, to find out why (``hypotheses.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.norms import NormSpec, probed_spec
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.site_stream import Where, remote_norm, stream_site_values
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import InputSite, OutputSite

from .readings import SiteValues

#: At most so many positions are kept: enough to tell hypotheses apart.
MAX_POSITIONS = 256
_INPUTS: tuple[InputSite, ...] = ("R", "N1")
_OUTPUTS: tuple[OutputSite, ...] = ("O", "O'")


def read_sites(
    model: Any,
    sites: Sites,
    leading: Mapping[int, int],
    batches: Sequence[Tensor],
    server: RemoteServer | None = None,
) -> dict[int, SiteValues]:
    """Read the sites of some layers.

    Args:
        model: An nnsight model.
        sites: Its sites.
        leading: Layer -> how many leading positions are left out.
        batches: Token ids ``(n, T)``.
        server: Where the model is, if not here.
    """
    norms = {layer: _norm(model, sites, layer, server) for layer in leading}
    wanted: list[Where] = [(layer, name) for layer in leading for name in (*_INPUTS, *_OUTPUTS)]
    kept = list(_first_positions(batches))
    read: dict[Where, list[Tensor]] = {where: [] for where in wanted}
    stream = stream_site_values(model, wanted, kept, sites=sites, remote=server)
    for values in stream:
        for where, value in values.items():
            read[where].append(value[:, leading[where[0]] :].flatten(0, 1))
    found = {}
    for layer, start in leading.items():
        first = [_first(ids)[:, start:].flatten() for ids in kept]
        inputs: dict[InputSite, Tensor] = {name: torch.cat(read[layer, name]) for name in _INPUTS}
        outputs: dict[OutputSite, Tensor] = {
            name: torch.cat(read[layer, name]) for name in _OUTPUTS
        }
        norm = norms[layer]
        if norm is not None:
            wide = inputs["R"].to(torch.promote_types(inputs["R"].dtype, torch.float32))
            inputs["N0"] = norm.normalise(wide)
        gain = None if norm is None else norm.gain
        found[layer] = SiteValues(inputs, outputs, gain, torch.cat(first))
    return found


def _first(ids: Tensor) -> Tensor:
    first = torch.zeros(ids.shape, dtype=torch.bool)
    first[:, 0] = True
    return first


def _first_positions(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    left = MAX_POSITIONS
    for ids in batches:
        n = min(len(ids), max(0, left // ids.shape[1]))
        if n:
            yield ids[:n]
        left -= n * ids.shape[1]


def _norm(model: Any, sites: Sites, layer: int, server: RemoteServer | None) -> NormSpec | None:
    path = sites.layers[layer].mlp_norm
    if path is None:
        return None
    try:
        if server is not None:
            return remote_norm(model, sites, layer, server)
        return probed_spec(hf_module(model), path, sites.d_model)
    except SiteError:  # no norm that has a site N0
        return None

"""The values at all of a layer's sites on a text, read in one trace per batch.

``verify`` needs them only where a set does not fit, to find out why (``hypotheses.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from .errors import SiteError
from .models import hf_module
from .norms import NormSpec, probed_spec
from .readings import SiteValues
from .sites import Sites
from .transcoder import InputSite, OutputSite

#: At most so many positions are kept: enough to tell hypotheses apart.
MAX_POSITIONS = 256
_NAMES = ("R", "N1", "O", "O'")


def read_sites(
    model: Any, sites: Sites, leading: Mapping[int, int], batches: Sequence[Tensor]
) -> dict[int, SiteValues]:
    """Read the sites of some layers.

    Args:
        model: An nnsight model.
        sites: Its sites.
        leading: Layer -> how many leading positions are left out.
        batches: Token ids ``(n, T)``.
    """
    parts: dict[int, dict[str, list[Tensor]]] = {
        layer: {name: [] for name in (*_NAMES, "first")} for layer in leading
    }
    for ids in _first_positions(batches):
        with torch.no_grad():
            values = _trace(model, sites, list(leading), ids)
        for (layer, start), read in zip(leading.items(), values, strict=True):
            for name, value in zip(_NAMES, read, strict=True):
                kept = value.reshape(*ids.shape, -1)[:, start:]
                parts[layer][name].append(kept.flatten(0, 1))
            first = torch.zeros(ids.shape, dtype=torch.bool)
            first[:, 0] = True
            parts[layer]["first"].append(first[:, start:].flatten())
    return {
        layer: _site_values(model, sites, layer, {k: torch.cat(v) for k, v in named.items()})
        for layer, named in parts.items()
    }


def _first_positions(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    left = MAX_POSITIONS
    for ids in batches:
        n = min(len(ids), max(0, left // ids.shape[1]))
        if n:
            yield ids[:n]
        left -= n * ids.shape[1]


def _site_values(model: Any, sites: Sites, layer: int, read: Mapping[str, Tensor]) -> SiteValues:
    inputs: dict[InputSite, Tensor] = {"R": read["R"], "N1": read["N1"]}
    outputs: dict[OutputSite, Tensor] = {"O": read["O"], "O'": read["O'"]}
    norm = _norm(model, sites, layer)
    if norm is not None:
        wide = read["R"].to(torch.promote_types(read["R"].dtype, torch.float32))
        inputs["N0"] = norm.normalise(wide)
    return SiteValues(inputs, outputs, None if norm is None else norm.gain, read["first"])


def _norm(model: Any, sites: Sites, layer: int) -> NormSpec | None:
    path = sites.layers[layer].mlp_norm
    if path is None:
        return None
    try:
        return probed_spec(hf_module(model), path, sites.d_model)
    except SiteError:  # no norm that has a site N0
        return None


def _trace(model: Any, sites: Sites, layers: list[int], ids: Tensor) -> list[tuple[Tensor, ...]]:
    # One function, read by nnsight as source: the block below runs inside the forward pass.
    with model.trace(ids):
        values: list[tuple[Tensor, ...]] = nnsight.save([])
        for layer in layers:
            here = sites.layers[layer]
            resid = None
            if sites.parallel:
                resid = model.get(here.block).input.clone()
            elif here.mlp_norm is not None:
                resid = model.get(here.mlp_norm).input.clone()
            mlp_in = model.get(here.mlp_in).input.clone()
            mlp_out = model.get(here.mlp_out).output
            mlp_out = (mlp_out[0] if isinstance(mlp_out, tuple) else mlp_out).clone()
            post = mlp_out
            if here.mlp_post_norm is not None:
                post = model.get(here.mlp_post_norm).output.clone()
            values.append((mlp_in if resid is None else resid, mlp_in, mlp_out, post))
    return values

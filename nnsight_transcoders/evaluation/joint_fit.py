"""``verify`` for a set whose features are chosen over all layers together.

While an early layer runs, the features of later layers are not known, so such a set cannot run
inside the model. It can be measured on a finished run: one pass reads every layer's values, from
which features and reconstructions follow; a second pass writes the reconstructions in the MLPs'
place. Its inputs are the unreplaced model's, so the cross-entropy says what the reconstructions
lose, without the errors of early layers changing the features of later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.circuits.active import ActiveFeatures, active_features
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.circuits.freeze import (
    attribution_dtype,
    freeze_norms,
    input_values,
    mlp_sides,
)
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.remote.calls import call
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.site_stream import output_path
from nnsight_transcoders.sites import Sites

from .fit_job import entropies
from .fit_sums import FitSums


def joint_fit(
    model: Any, transcoders: TranscoderSet, batches: Sequence[Tensor], sites: Sites
) -> tuple[dict[int, FitSums], float]:
    """Per layer its sums, and the next-token cross-entropy summed over the text (nats) with all
    layers' reconstructions in place.

    Args:
        model: An nnsight model.
        transcoders: A set with activation ``jointtopk``.
        batches: Token ids ``(n, T)``.
        sites: The model's sites.
    """
    sums = {layer: FitSums(sites.d_model) for layer in transcoders.layers}
    ce = 0.0
    for ids in (row for batch in batches for row in batch):
        active = _encode(model, transcoders, ids, sites)
        written = []
        for layer, features in active.layers.items():
            start = transcoders.config(layer).leading_positions
            output, error = active.output[layer], active.error[layer]
            sums[layer].add(output[start:], error[start:], len(features))
            made = output.clone()
            made[start:] -= error[start:]
            path = output_path(sites, layer, transcoders.config(layer).output_site)
            written.append({"path": path, "value": made[None], "row": 0})
        with torch.no_grad():
            ce += float(call(model, ids[None], entropies, written, ids[None]).sum())
    return sums, ce


def _encode(model: Any, transcoders: TranscoderSet, ids: Tensor, sites: Sites) -> ActiveFeatures:
    module = hf_module(model)
    run = collect(model, sites, ids)
    sides = mlp_sides(sites, run, freeze_norms(module, sites, run), transcoders)
    dtype = attribution_dtype(run.final.dtype)
    return active_features(run, transcoders, input_values(run, sides), dtype)

"""``verify`` for a set whose features are chosen over all layers together.

While an early layer runs, the features of later layers are not known, so such a set cannot run
inside the model. It can be measured on a finished run: one pass reads every layer's values, from
which features and reconstructions follow; a second pass writes the reconstructions in the MLPs'
place. Its inputs are the unreplaced model's, so the cross-entropy says what the reconstructions
lose, without the errors of early layers changing the features of later ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

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
        written = {}
        for layer, features in active.layers.items():
            start = transcoders.config(layer).leading_positions
            output, error = active.output[layer], active.error[layer]
            sums[layer].add(output[start:], error[start:], len(features))
            made = output.clone()
            made[start:] -= error[start:]
            written[_path(sites, transcoders, layer)] = made
        ce += _replaced(model, ids[None], written)
    return sums, ce


def _encode(model: Any, transcoders: TranscoderSet, ids: Tensor, sites: Sites) -> ActiveFeatures:
    module = hf_module(model)
    run = collect(model, sites, ids)
    sides = mlp_sides(sites, run, freeze_norms(module, sites, run), transcoders)
    dtype = attribution_dtype(run.final.dtype)
    return active_features(run, transcoders, input_values(run, sides), dtype)


def _path(sites: Sites, transcoders: TranscoderSet, layer: int) -> str:
    here = sites.layers[layer]
    post = here.mlp_post_norm if transcoders.config(layer).output_site == "O'" else None
    return post or here.mlp_out


def _replaced(model: Any, ids: Tensor, written: Mapping[str, Tensor]) -> float:
    """The summed cross-entropy with values ``(T, D)`` written at paths, in the model's order."""
    # One function, read by nnsight as source: the block below runs inside the forward pass.
    with torch.no_grad():
        with model.trace(ids):
            for path, value in written.items():
                output = model.get(path).output
                if isinstance(output, tuple):
                    made = value.reshape(output[0].shape).to(output[0].dtype)
                    model.get(path).output = (made, *output[1:])
                else:
                    model.get(path).output = value.reshape(output.shape).to(output.dtype)
            logits = model.output.logits.save()
    return float(
        F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum")
    )

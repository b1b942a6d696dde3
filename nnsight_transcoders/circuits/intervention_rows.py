"""What of a transcoder set an intervention takes: rows of features, vectors of errors.

Encoder rows of the features that are read or set, decoder rows of those that are set, and nothing
else, but in two cases. Features that compete (TopK) cannot be known without the others, so that the
layer's whole encoder is needed; and where transcoders answer in place of the MLPs, all that they
have.

Legend: n entries, T positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.attachment.feature_rows import ELEMENTWISE
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.site_stream import Where, site_values
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import FeatureEncoder

#: Positions and indices of features, each ``(n,)``.
Places = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Changes:
    """Changes of one kind of node in one layer; each ``(n,)``.

    Attributes:
        row: Which row of the batch.
        position: Where.
        index: Which feature; meaningless for errors and tokens.
        factor: What its value in the first row is multiplied by.
    """

    row: Tensor
    position: Tensor
    index: Tensor
    factor: Tensor


def layer_rows(
    transcoders: TranscoderSet,
    layer: int,
    changes: Changes | None,
    read: Places | None,
    *,
    pinned: bool,
    follow: bool,
) -> dict[str, Any] | None:
    """What ``feature_changes.set_features`` needs of a layer's transcoder, as plain data.

    Args:
        transcoders: The set.
        layer: Which layer.
        changes: Features to set.
        read: Features whose activations are asked for.
        pinned: Whether the layer's features and error are held.
        follow: Whether only its error is.

    Returns:
        None if it needs nothing.
    """
    config = transcoders.config(layer)
    skip = config.skip and (pinned or follow)
    if changes is None and read is None and not follow and not skip:
        return None
    module = transcoders.load(layer)
    none = torch.empty(0, dtype=torch.long)
    changed = none if changes is None else changes.index.unique()
    encoded = torch.cat([changed, none if read is None else read[1]]).unique()
    if follow or (len(encoded) and config.activation not in ELEMENTWISE):
        encoded = torch.arange(config.d_transcoder)
    found: dict[str, Any] = {
        "leading_positions": config.leading_positions,
        "targets": list(transcoders.targets(layer)),
        "pinned": pinned,
        "follow": follow,
        "skip": module.W_skip.detach() if skip and module.W_skip is not None else None,
        "encoder": None,
        "settings": None,
        "read": None,
    }
    if not len(encoded):
        return found
    names = ("k", "relu_first", "n_groups")
    found |= {
        "encoder": _of(module.W_enc, encoded),
        "encoder_bias": _of(module.b_enc, encoded),
        "threshold": _threshold(module, encoded),
        "activation": {"name": config.activation, **{n: getattr(config, n) for n in names}},
        "decoder": _of(module.W_dec, encoded if follow else changed),
        "decoded": None if follow else torch.searchsorted(encoded, changed),
    }
    if changes is not None:
        found["settings"] = {
            "row": changes.row,
            "position": changes.position,
            "column": torch.searchsorted(encoded, changes.index),
            "factor": changes.factor,
        }
    if read is not None:
        found["read"] = {"position": read[0], "column": torch.searchsorted(encoded, read[1])}
    return found


def _threshold(module: FeatureEncoder, rows: Tensor) -> Tensor | None:
    """The thresholds of some features; one for all of them is a number."""
    threshold = getattr(module.activation, "threshold", None)
    if threshold is None:
        return None
    return _of(threshold, rows) if threshold.dim() else threshold.detach()


def _of(table: Any, rows: Tensor) -> Tensor:
    """Rows of a weight: the weight itself if that is all of them."""
    table = table.detach()
    return table if len(rows) == len(table) else table[rows.to(table.device)]


@torch.no_grad()
def error_vectors(
    model: Any,
    sites: Sites,
    transcoders: TranscoderSet,
    token_ids: Tensor,
    nodes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    remote: Remote | None,
) -> dict[tuple[int, int], Tensor]:
    """The errors of a prompt at some layers and positions, from one run that reads a few values.

    Args:
        model: An nnsight model.
        sites: Its sites.
        transcoders: The set.
        token_ids: ``(T,)``.
        nodes: Layer and position of each.
        dtype: In which they are computed.
        remote: Where the model is.

    Returns:
        Layer and position -> ``(D,)``: at the output site of the layer's transcoder; of a layer
        without one, all that its MLP adds to the residual stream.
    """
    positions = sorted({position for _, position in nodes})
    kept = torch.zeros(1, len(token_ids), dtype=torch.bool)
    kept[0, positions] = True
    layers = sorted({layer for layer, _ in nodes})
    writers = {n: [s for s in transcoders.layers if n in transcoders.targets(s)] for n in layers}
    inputs: dict[int, Where] = {
        s: (s, transcoders.config(s).input_site) for n in layers for s in writers[n]
    }
    outputs: dict[int, Where] = {
        n: (n, transcoders.config(n).output_site if n in transcoders else "O'") for n in layers
    }
    wanted = [*inputs.values(), *outputs.values()]
    values = site_values(model, wanted, token_ids[None], kept, sites=sites, remote=remote)
    exact = transcoders.to(dtype=dtype)  # a set of its own: what it loads goes with it
    x = {s: values[where].to(exact.device, dtype) for s, where in inputs.items()}
    acts = {}
    for s in x:
        acts[s] = exact[s].encode(x[s])
        acts[s][torch.tensor(positions) < exact.config(s).leading_positions] = 0
    found = {}
    for layer in layers:
        error = values[outputs[layer]].to(exact.device, dtype)
        if layer in transcoders:
            error = error - exact.decode(layer, acts, x[layer])
        for at, position in enumerate(positions):
            found[layer, position] = error[at]
    return found

"""What a feature does whatever the input: its direct effect on logits, and its de-embedding.

Section 4.2 of Dunefsky, Chlenski, Nanda 2024, on any architecture: products of the transcoder's
rows with the (un)embedding. Norms on the way count with their gain and centring, which do not
depend on the input, and without their denominators, which do; so values are comparable within a
feature and not between features of different layers. Attention is not on these paths.

Legend: n features, V vocabulary, D d_model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .collect import token_texts
from .graph import FEATURE, AttributionGraph
from .invariant import InvariantModel, invariant_model
from .virtual_weights import de_embed, logits_of, read_vectors, write_vectors


def logit_effects(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    features: Sequence[int] | Tensor,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """Direct effect of features on the logits, ``W_dec W_U`` minus its mean over the vocabulary.

    Args:
        model: An nnsight model.
        transcoders: Its set; a cross-layer feature counts with all that it writes.
        layer: Which layer.
        features: Feature indices ``(n,)``.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``.

    Returns:
        ``(n, V)`` in float32 (float64 for a float64 model), in logits per unit of activation times
            the final norm's denominator.
    """
    written = write_vectors(model, transcoders, layer, features, sites=sites, remote=remote)
    return logits_of(model, written, sites=sites, remote=remote)


def de_embeddings(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    features: Sequence[int] | Tensor,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> Tensor:
    """De-embedding of features, ``W_E W_enc``: how much each token, if it reached the feature
    directly, would switch it on.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        layer: Which layer.
        features: Feature indices ``(n,)``.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``.

    Returns:
        ``(n, V)`` in float32 (float64 for a float64 model); the mean over the vocabulary is not
            taken out.
    """
    read = read_vectors(model, transcoders, layer, features, sites=sites, remote=remote)
    return de_embed(model, read, sites=sites, remote=remote)


def feature_details(
    model: Any,
    transcoders: TranscoderSet,
    graph: AttributionGraph,
    *,
    top: int = 8,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Logit effects and de-embeddings of a graph's features, as ``graph.to_html`` takes them.

    Args:
        model: The nnsight model the graph was traced on, with a tokenizer.
        transcoders: Its set.
        graph: Usually a pruned graph; every distinct feature costs one row of ``V`` numbers twice.
        top: How many tokens per list.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. Two vectors of
            each feature go up, the lists come back: two requests.

    Returns:
        ``"layer_feature"`` -> ``top_logits``, ``bottom_logits``, ``de_embedding``: lists of
        (token, value).
    """
    chosen: dict[int, set[int]] = defaultdict(set)
    for number in (graph.kind == FEATURE).nonzero().flatten().tolist():
        chosen[int(graph.layer[number])].add(int(graph.index[number]))
    by_layer = {layer: sorted(found) for layer, found in sorted(chosen.items())}
    if not by_layer:
        return {}
    invariant = invariant_model(model, sites, remote)
    written, read = _vectors_of(invariant, transcoders, by_layer)
    lists = invariant.token_lists(written, read, min(top, invariant.sites.vocab_size))
    keys = [f"{layer}_{i}" for layer, features in by_layer.items() for i in features]
    return {
        key: {
            name: list(zip(token_texts(model, ids[n]), values[n].tolist(), strict=True))
            for name, (values, ids) in lists.items()
        }
        for n, key in enumerate(keys)
    }


def _vectors_of(
    invariant: InvariantModel, transcoders: TranscoderSet, by_layer: Mapping[int, Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """What features of several layers write to the stream and what they read of it ``(n, D)``."""
    written, read = [], []
    for layer, features in by_layer.items():
        rows = transcoders.rows(layer, features, "decoder")
        written.append(invariant.written_below(transcoders, layer, rows, invariant.sites.n_layers))
        rows = transcoders.rows(layer, features, "encoder")
        read.append(invariant.read(transcoders, layer, rows))
    return torch.cat(written), torch.cat(read)

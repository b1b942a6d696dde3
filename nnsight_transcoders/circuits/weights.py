"""What a feature does whatever the input: its direct effect on logits, and its de-embedding.

Section 4.2 of Dunefsky, Chlenski, Nanda 2024, on any architecture: products of the transcoder's
rows with the (un)embedding. Norms on the way count with their gain and centring, which do not
depend on the input, and without their denominators, which do; so values are comparable within a
feature and not between features of different layers. Attention is not on these paths.

Legend: n features, V vocabulary, D d_model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .graph import FEATURE, AttributionGraph
from .virtual_weights import de_embed, logits_of, read_vectors, write_vectors


def logit_effects(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    features: Sequence[int] | Tensor,
    *,
    sites: Sites | None = None,
) -> Tensor:
    """Direct effect of features on the logits, ``W_dec W_U`` minus its mean over the vocabulary.

    Args:
        model: An nnsight model.
        transcoders: Its set; a cross-layer feature counts with all that it writes.
        layer: Which layer.
        features: Feature indices ``(n,)``.
        sites: The model's sites, where they have to be given by hand.

    Returns:
        ``(n, V)`` in float32 (float64 for a float64 model), in logits per unit of activation times
            the final norm's denominator.
    """
    written = write_vectors(model, transcoders, layer, features, sites=sites)
    return logits_of(model, written, sites=sites)


def de_embeddings(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    features: Sequence[int] | Tensor,
    *,
    sites: Sites | None = None,
) -> Tensor:
    """De-embedding of features, ``W_E W_enc``: how much each token, if it reached the feature
    directly, would switch it on.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        layer: Which layer.
        features: Feature indices ``(n,)``.
        sites: The model's sites, where they have to be given by hand.

    Returns:
        ``(n, V)`` in float32 (float64 for a float64 model); the mean over the vocabulary is not
            taken out.
    """
    read = read_vectors(model, transcoders, layer, features, sites=sites)
    return de_embed(model, read, sites=sites)


def feature_details(
    model: Any,
    transcoders: TranscoderSet,
    graph: AttributionGraph,
    *,
    top: int = 8,
    sites: Sites | None = None,
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Logit effects and de-embeddings of a graph's features, as ``graph.to_html`` takes them.

    Args:
        model: The nnsight model the graph was traced on, with a tokenizer.
        transcoders: Its set.
        graph: Usually a pruned graph; every distinct feature costs one row of ``V`` numbers twice.
        top: How many tokens per list.
        sites: The model's sites, where they have to be given by hand.

    Returns:
        ``"layer_feature"`` -> ``top_logits``, ``bottom_logits``, ``de_embedding``: lists of
        (token, value).
    """
    by_layer: dict[int, set[int]] = defaultdict(set)
    for number in (graph.kind == FEATURE).nonzero().flatten().tolist():
        by_layer[int(graph.layer[number])].add(int(graph.index[number]))
    details: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for layer, found in sorted(by_layer.items()):
        features = sorted(found)
        effects = logit_effects(model, transcoders, layer, features, sites=sites)
        tokens = de_embeddings(model, transcoders, layer, features, sites=sites)
        for i, feature in enumerate(features):
            details[f"{layer}_{feature}"] = {
                "top_logits": _ranked(model, effects[i], top),
                "bottom_logits": _ranked(model, effects[i], top, largest=False),
                "de_embedding": _ranked(model, tokens[i], top),
            }
    return details


def _ranked(
    model: Any, values: Tensor, top: int, *, largest: bool = True
) -> list[tuple[str, float]]:
    best = values.topk(min(top, len(values)), largest=largest)
    tokenizer = getattr(model, "tokenizer", None)
    names = [
        f"<{i}>" if tokenizer is None else tokenizer.decode([i]) for i in best.indices.tolist()
    ]
    return list(zip(names, best.values.tolist(), strict=True))

"""Which features become nodes, and their edges: all of them, or the most influential first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .candidates import Candidates, Engine
from .edges import batch_size, batches
from .linear import Targets


def expand(
    candidates: Candidates, engine: Engine, max_nodes: int, memory: int, *, verbose: bool
) -> tuple[Tensor, Tensor]:
    """Edge rows of the chosen targets and of the features that become nodes.

    With more active features than ``max_nodes``, features are expanded in the order of their
    influence on the targets, estimated from the rows known so far and again as rows arrive.

    Args:
        candidates: The candidate nodes.
        engine: What computes the rows.
        max_nodes: Bound on the number of features.
        memory: Bytes for a batch.
        verbose: Show progress.

    Returns:
        ``(G + n, C)`` rows on the CPU, the G targets first, and ``(n,)`` numbers of the features.
    """
    size = batch_size(
        candidates.run.n_positions,
        candidates.chosen.direction.shape[1],
        candidates.n_columns,
        candidates.chosen.direction.element_size(),
        memory,
    )
    n_targets = len(candidates.chosen.names)
    n_expand = min(max_nodes, candidates.n_features)
    rows = torch.empty(n_targets + n_expand, candidates.n_columns, dtype=candidates.dtype)
    at = 0
    for part in _split(candidates.logit_targets(), size):
        rows[at : at + len(part.layer)] = engine.rows(
            candidates.sources, part, candidates.n_columns
        )
        at += len(part.layer)
    expanded = torch.empty(n_expand, dtype=torch.long, device=candidates.layer.device)
    done = 0
    with tqdm(total=n_expand, desc="edges", disable=not verbose, leave=False) as bar:
        while done < n_expand:
            wave = _next_wave(candidates, rows, expanded[:done], n_expand, size)
            for chunk in batches(candidates.layer[wave], candidates.positions[wave], size):
                features = wave[chunk]
                stop = done + len(features)
                rows[n_targets + done : n_targets + stop] = engine.rows(
                    candidates.sources, candidates.feature_targets(features), candidates.n_columns
                )
                expanded[done:stop] = features
                done = stop
                bar.update(len(features))
    return rows, expanded


def _split(targets: Targets, size: int) -> Iterator[Targets]:
    columns = (targets.vector, targets.layer, targets.position)
    return (Targets(*part) for part in zip(*(c.split(size) for c in columns), strict=True))


def _next_wave(
    candidates: Candidates, rows: Tensor, expanded: Tensor, n_expand: int, size: int
) -> Tensor:
    """The features to expand next: all of them, or the most influential ones by now."""
    if n_expand == candidates.n_features:
        return torch.arange(candidates.n_features, device=candidates.layer.device)
    n_targets = len(candidates.chosen.names)
    expanded = expanded.cpu()
    share = rows[: n_targets + len(expanded)].abs()
    share /= share.sum(1, keepdim=True).clamp_min(1e-30)
    reached = torch.zeros(len(share), dtype=share.dtype)
    reached[:n_targets] = candidates.chosen.weight.to(share)
    influence = torch.zeros(candidates.n_columns, dtype=share.dtype)
    while reached.any():
        step = reached @ share
        influence += step
        reached = torch.cat([torch.zeros(n_targets, dtype=share.dtype), step[expanded]])
    influence = influence[: candidates.n_features]
    influence[expanded] = -1
    wave = min(n_expand - len(expanded), max(size, n_expand // 8))
    return influence.topk(wave).indices.to(candidates.layer.device)

"""Which features become nodes, and their edges: all of them, or the most influential first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .candidates import Candidates, Engine
from .edges import batch_size, batches
from .linear import Targets

#: Elements of edge rows that are looked through at a time when influence is estimated.
SHARES_AT_A_TIME = 16 * 2**20


def expand(
    candidates: Candidates,
    engine: Engine,
    max_nodes: int,
    memory: int,
    *,
    offload: str | None = None,
    verbose: bool,
) -> tuple[Tensor, Tensor]:
    """Edge rows of the chosen targets and of the features that become nodes.

    With more active features than ``max_nodes``, features are expanded in the order of their
    influence on the targets, estimated from the rows known so far and again as rows arrive.

    Args:
        candidates: The candidate nodes.
        engine: What computes the rows.
        max_nodes: Bound on the number of features.
        memory: Bytes for a batch.
        offload: ``"disk"``: keep the rows in a temporary file (in ``TMPDIR``).
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
    rows = _storage(n_targets + n_expand, candidates.n_columns, candidates.dtype, offload)
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
            wave = next_wave(candidates, rows, expanded[:done], n_expand, size)
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


def next_wave(
    candidates: Candidates, rows: Tensor, expanded: Tensor, n_expand: int, size: int
) -> Tensor:
    """The features to expand next: all of them, or the most influential ones by now."""
    if n_expand == candidates.n_features:
        return torch.arange(candidates.n_features, device=candidates.layer.device)
    found = _influence(candidates, rows, expanded)[: candidates.n_features]
    found[expanded.cpu()] = -1
    wave = min(n_expand - len(expanded), max(size, n_expand // 8))
    return found.topk(wave).indices.to(candidates.layer.device)


def _influence(candidates: Candidates, rows: Tensor, expanded: Tensor) -> Tensor:
    """``(C,)`` influence on the targets, as far as it flows through the rows known.

    One pass over the rows from the top layer down: edges lead upwards only, so that a feature's
    own influence is known when its row's turn comes.
    """
    n_targets = len(candidates.chosen.names)
    influence = torch.zeros(candidates.n_columns, dtype=rows.dtype)
    at_a_time = max(1, SHARES_AT_A_TIME // candidates.n_columns)

    def pass_on(which: Tensor, reached: Tensor) -> None:
        for part, weight in zip(which.split(at_a_time), reached.split(at_a_time), strict=True):
            share = rows[part].abs()
            influence.addmv_(share.T, weight / share.sum(1).clamp_min(1e-30))

    pass_on(torch.arange(n_targets), candidates.chosen.weight.to(influence))
    layer, features = candidates.layer[expanded].cpu(), expanded.cpu()
    for number in layer.unique().flip(0):
        here = (layer == number).nonzero().flatten()
        pass_on(n_targets + here, influence[features[here]])
    return influence


def _storage(n_rows: int, n_columns: int, dtype: torch.dtype, offload: str | None) -> Tensor:
    """Room for edge rows: in memory, or in a temporary file that goes with its last reference."""
    if offload != "disk":
        return torch.empty(n_rows, n_columns, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="nnsight-transcoders-") as file:
        size = n_rows * n_columns
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(n_rows, -1)

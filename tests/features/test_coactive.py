"""Co-active features from sketches against sets of positions."""

from __future__ import annotations

import pytest
import torch

from nnsight_transcoders.features import coactive
from nnsight_transcoders.features.coactive import coactive_features
from nnsight_transcoders.features.tables import mixed

N_POSITIONS = 4000


def active_positions(seed: int = 0) -> torch.Tensor:
    """``(F, positions)``: six features that follow one another more or less, and some of chance."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.rand(N_POSITIONS, generator=draw) < 0.05
    rows = [base]
    for noise in (0.02, 0.2, 0.5, 0.8):
        flip = torch.rand(N_POSITIONS, generator=draw) < noise
        rows.append(base & ~flip)
    rows += [torch.rand(N_POSITIONS, generator=draw) < rate for rate in (0.01, 0.3)]
    rows.append(torch.zeros(N_POSITIONS, dtype=torch.bool))
    return torch.stack(rows)


def sketches(active: torch.Tensor, size: int) -> torch.Tensor:
    keys = torch.full((len(active), size), -1)
    for feature, row in enumerate(active):
        found = mixed(row.nonzero().flatten()).sort(descending=True).values[:size]
        keys[feature, : len(found)] = found
    return keys


def jaccard(active: torch.Tensor) -> torch.Tensor:
    both = active.double() @ active.double().T
    count = active.sum(1).double()
    return both / (count[:, None] + count[None, :] - both).clamp_min(1)


def test_complete_sketches_give_exact_overlaps() -> None:
    active = active_positions()
    index, overlap = coactive_features(sketches(active, 2000), top=7)
    exact = jaccard(active)
    for feature in range(len(active)):
        found = {int(i): float(v) for i, v in zip(index[feature], overlap[feature], strict=True)}
        found.pop(-1, None)
        shared = (active[feature] & active).sum(1)
        expected = {
            other: float(exact[feature, other])
            for other in range(len(active))
            if other != feature and shared[other] >= 2
        }
        assert found.keys() == expected.keys()
        for other, value in expected.items():
            assert found[other] == pytest.approx(value, rel=1e-6)
        assert overlap[feature].tolist() == sorted(overlap[feature].tolist(), reverse=True)


def test_sketches_estimate_overlaps() -> None:
    errors = []
    for seed in range(5):
        active = active_positions(seed)
        index, overlap = coactive_features(sketches(active, 64), top=3)
        exact = jaccard(active)
        assert index[0, 0] == 1
        errors += [float(overlap[0, j] - exact[0, index[0, j]]) for j in range(3)]
    assert max(map(abs, errors)) < 0.2  # the standard error is 0.06
    assert abs(sum(errors) / len(errors)) < 0.06


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = sketches(active_positions(), 64)
    whole = coactive_features(keys, top=4)
    monkeypatch.setattr(coactive, "_PAIRS", 50)
    parts = coactive_features(keys, top=4)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_without_any_activity() -> None:
    index, overlap = coactive_features(torch.full((3, 4), -1), top=2)
    assert (index == -1).all()
    assert not overlap.any()

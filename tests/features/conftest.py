"""The builtin model, and a bundle of its features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel

from nnsight_transcoders import FeatureBundle, TranscoderSet, builtin_model_path, collect_features
from nnsight_transcoders.builtin.text import sentences
from nnsight_transcoders.features.statistics import StatisticsConfig

TEXTS = sentences(60, seed=5)
CONFIG = StatisticsConfig(n_top=5, n_bands=4, per_band=4, before=8, after=3, n_reference=24)


@pytest.fixture(scope="session")
def model() -> Any:
    return TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)


@pytest.fixture(scope="session")
def transcoders() -> TranscoderSet:
    """In float32, so that nothing depends on what else is in a batch by more than rounding."""
    return TranscoderSet.from_pretrained("builtin/per-layer", dtype=torch.float32)


@pytest.fixture(scope="session")
def collected(
    model: Any, transcoders: TranscoderSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a bundle of two layers; copy it before changing it."""
    folder = tmp_path_factory.mktemp("features") / "bundle"
    collect_features(model, transcoders, TEXTS, folder, layers=[1, 2], config=CONFIG)
    return folder


@pytest.fixture
def bundle(collected: Path) -> FeatureBundle:
    return FeatureBundle.open(collected)

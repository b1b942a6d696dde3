"""Models, runs and transcoder sets for the circuit tests, built once per session."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import zoo
from torch import Tensor

from nnsight_transcoders import TranscoderSet
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.active import ActiveFeatures, active_features
from nnsight_transcoders.circuits.collect import Run, collect
from nnsight_transcoders.circuits.engine import OperatorEngine
from nnsight_transcoders.sites import Sites, resolve_sites

IDS = (1, 40, 7, 23, 7, 66, 12)


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny nnsight model."""
    return zoo.nnsight_model(name, dtype=dtype)


@cache
def run(name: str, dtype: torch.dtype = torch.float32) -> tuple[Sites, Run]:
    """Its sites, and one run of it."""
    nn_model = model(name, dtype)
    sites = resolve_sites(nn_model)
    return sites, collect(nn_model, sites, torch.tensor(IDS))


@cache
def transcoders(
    name: str, kind: str, dtype: torch.dtype = torch.float32, **config: Any
) -> TranscoderSet:
    """A random set at the scale of that run."""
    return random_transcoders(run(name, dtype)[1], kind, d_transcoder=24, **config)  # type: ignore[arg-type]


def engine(
    name: str, kind: str, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[OperatorEngine, ActiveFeatures]:
    """The explicit operator and the active features of that run."""
    sites, the_run = run(name, dtype)
    chosen = transcoders(name, kind, dtype, **config)
    out = OperatorEngine(model(name, dtype)._module, sites, the_run, chosen)
    return out, active_features(the_run, chosen, out.inputs, out.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))

"""A damaged checkpoint that still loads is either still right, or ``verify`` does not accept it.

The set reconstructs its model exactly, so what it should compute is known: the model's own MLPs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verify_support import TEXT, exact, relu_model

from nnsight_transcoders import TranscoderSet, verify
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.errors import TranscoderError
from nnsight_transcoders.evaluation.verifying import FAILS_FROM
from nnsight_transcoders.hub.circuit_tracer_save import save_circuit_tracer
from nnsight_transcoders.hub.saelens_save import save_saelens
from nnsight_transcoders.norms import probed_spec
from nnsight_transcoders.sites import resolve_sites

from .test_mutations import EXAMPLES, mutate

SAVERS: dict[str, Callable[[TranscoderSet, Path], Any]] = {
    "native": lambda transcoders, folder: transcoders.save_pretrained(folder),
    "circuit-tracer": save_circuit_tracer,
    "saelens": save_saelens,
}
#: What a layout does not say: the exact set's matrices are square.
OPTIONS: dict[str, dict[str, Any]] = {"circuit-tracer": {"decoder_layout": "rows"}}


@cache
def model() -> Any:
    return relu_model()


@cache
def values() -> dict[str, list[torch.Tensor]]:
    """Per site and layer, the values over ``TEXT`` without the first positions."""
    sites = resolve_sites(model())
    runs = [collect(model(), sites, torch.tensor(text)) for text in TEXT]
    found: dict[str, list[torch.Tensor]] = {"R": [], "N0": [], "N1": [], "O": []}
    for layer in range(sites.n_layers):
        for site, name in (("R", "mid"), ("N1", "mlp_in"), ("O", "mlp_out")):
            found[site].append(torch.cat([getattr(run, name)[layer][1:] for run in runs]))
        spec = probed_spec(model()._module, sites.layers[layer].mlp_norm, found["R"][-1].shape[1])
        found["N0"].append(spec.normalise(found["R"][-1]))
    return found


def unexplained(transcoders: TranscoderSet, layer: int) -> float:
    """FVU of a layer, computed here and not by the package."""
    config, y = transcoders.config(layer), values()["O"][layer]
    with torch.no_grad():
        error = y - transcoders[layer](values()[config.input_site][layer])
    return float(error.square().sum() / (y - y.mean(0)).square().sum())


@pytest.fixture(scope="module", params=SAVERS)
def valid(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exact") / "set"
    SAVERS[request.param](exact(model()), folder)
    return folder, OPTIONS.get(request.param, {})


def test_the_set_is_accepted(valid: tuple[Path, dict[str, Any]]) -> None:
    folder, options = valid
    report = verify(model(), TranscoderSet.from_pretrained(folder, **options), TEXT)
    assert report.ok
    assert max(layer.fvu for layer in report.layers) < 1e-6


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_wrong_set_is_accepted(
    valid: tuple[Path, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    place = tmp_path_factory.mktemp("mutated")
    folder = place / "set"
    try:
        shutil.copytree(valid[0], folder)
        mutate(folder, data)
        try:
            transcoders = TranscoderSet.from_pretrained(folder, **valid[1])
            report = verify(model(), transcoders, TEXT)
        except TranscoderError:
            return
        if report.ok:
            worst = max(unexplained(transcoders, layer) for layer in transcoders.layers)
            assert worst < FAILS_FROM
    finally:
        shutil.rmtree(place)

"""A real model (SmolLM2-135M from PyPI): its known predictions, and circuits of it.

The model is made once by ``examples/get_smollm2.py``, which needs a network; the folder
``SMOLLM2`` names is used if it is there. See docs/testing.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

from nnsight_transcoders import attach, attribute, resolve_sites
from nnsight_transcoders.check import check, logits_difference, random_transcoders
from nnsight_transcoders.circuits.collect import collect, token_ids_of

pytestmark = pytest.mark.real_model

SCRIPT = Path(__file__).parents[2] / "examples" / "get_smollm2.py"
INDIRECT_OBJECT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="session")
def folder() -> Path:
    found = Path(os.environ.get("SMOLLM2", Path.home() / ".cache" / "nnsight-transcoders/smollm2"))
    if not (found / "tokenizer.json").exists():
        subprocess.run([sys.executable, str(SCRIPT), str(found)], check=True)
    return found


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return nnsight.TransformersModel(str(folder), task="text-generation", dispatch=True)


@pytest.mark.parametrize(
    ("prompt", "token", "probability"),
    [
        ("The capital of France is", " Paris", 0.77),
        (INDIRECT_OBJECT, " Mary", 0.92),
    ],
)
def test_it_predicts_what_is_known_of_it(
    model: Any, prompt: str, token: str, probability: float
) -> None:
    with torch.no_grad():
        with model.trace(prompt):
            logits = model.output.logits[0, -1].save()
    best = logits.softmax(-1).max(0)
    assert model.tokenizer.decode([int(best.indices)]) == token
    assert float(best.values) == pytest.approx(probability, abs=0.02)


def test_digits_are_single_tokens(model: Any) -> None:
    assert model.tokenizer.tokenize("1732") == list("1732")
    assert model.tokenizer.decode(model.tokenizer("the year 17!")["input_ids"]) == "the year 17!"


def test_the_identities_hold(model: Any) -> None:
    report = check(model)
    assert report.ok, report.to_dict()
    assert len(report.rows) == 10


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
def test_a_circuit_of_every_kind(model: Any, kind: Any) -> None:
    sites = resolve_sites(model)
    ids = token_ids_of(model, INDIRECT_OBJECT, sites)
    run = collect(model, sites, ids)
    chosen = random_transcoders(run, kind, d_transcoder=256, activation="topk", k=8)
    replaced = attach(model, chosen, mode="replace+error")
    assert logits_difference(model, replaced, ids) < 1e-4
    graph = attribute(model, chosen, ids)
    assert graph.completeness_error is not None
    assert graph.completeness_error < 1e-4
    assert len(graph.of_kind("feature")) == 8 * len(ids) * sites.n_layers
    assert graph.target_names[0] == " Mary"
    pruned = graph.prune()
    assert 0 < pruned.n_nodes < graph.n_nodes


def test_the_same_in_bfloat16(folder: Path) -> None:
    half = nnsight.TransformersModel(
        str(folder), task="text-generation", dispatch=True, dtype=torch.bfloat16
    )
    report = check(half, kinds=("per-layer",))
    assert report.ok, report.to_dict()

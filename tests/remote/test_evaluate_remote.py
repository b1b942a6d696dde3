"""``evaluate`` where the model runs on a server that does not have this package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nnsight
import pytest
import transformers
from loopback import Loopback
from nnsight.modeling import huggingface

from nnsight_transcoders import TranscoderSet, builtin_model_path, evaluate


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    started = Loopback(builtin_model_path()).start()
    # The model's id comes from the Hub, which is not asked here.
    huggingface._ID_CACHE[builtin_model_path()] = "test/builtin"
    yield started
    huggingface._ID_CACHE.pop(builtin_model_path())
    started.kill()


def numbers(report: Any) -> list[float]:
    found = [report.ce, report.n_tokens, report.n_predictions]
    for one in report.layers:
        found += [one.fvu, one.l0, one.dead, one.dense, one.alone.ce_change, one.alone.kl]
    together = report.together
    return [*found, together.ce_change, together.kl, together.top1, together.ce_change_mean]


@pytest.mark.parametrize("kind", ["skip", "clt"])
def test_the_numbers_are_those_of_a_model_that_is_here(server, kind):
    path, task = builtin_model_path(), "text-generation"
    here = nnsight.TransformersModel(path, task=task, dispatch=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    there = nnsight.TransformersModel(path, task=task, tokenizer=tokenizer)
    chosen = TranscoderSet.from_pretrained(f"builtin/{kind}")
    options = {"max_tokens": 200, "batch_size": 8}
    before = len(server.requests())
    found = evaluate(there, chosen, "builtin", remote=server.url, **options)
    assert next(there._module.parameters()).is_meta  # the weights stayed where they are
    assert len(server.requests()) == before + 2
    expected = evaluate(here, chosen, "builtin", **options)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)
    rehearsed = evaluate(here, chosen, "builtin", remote="local", **options)
    assert numbers(rehearsed) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)

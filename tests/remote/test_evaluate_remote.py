"""``evaluate`` where the model runs on a server that does not have this package."""

from __future__ import annotations

from typing import Any

import pytest
from loopback import Loopback

from nnsight_transcoders import TranscoderSet, evaluate


def numbers(report: Any) -> list[float]:
    found = [report.ce, report.n_tokens, report.n_predictions]
    for one in report.layers:
        found += [one.fvu, one.l0, one.dead, one.dense, one.alone.ce_change, one.alone.kl]
    together = report.together
    return [*found, together.ce_change, together.kl, together.top1, together.ce_change_mean]


@pytest.mark.parametrize("kind", ["skip", "clt"])
def test_the_numbers_are_those_of_a_model_that_is_here(
    server: Loopback, model: Any, local: Any, kind: str
) -> None:
    chosen = TranscoderSet.from_pretrained(f"builtin/{kind}")
    options = {"max_tokens": 200, "batch_size": 8}
    before = len(server.requests())
    found = evaluate(model, chosen, "builtin", remote=server.url, **options)
    assert next(model._module.parameters()).is_meta  # the weights stayed where they are
    assert len(server.requests()) == before + 2
    expected = evaluate(local, chosen, "builtin", **options)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)
    rehearsed = evaluate(local, chosen, "builtin", remote="local", **options)
    assert numbers(rehearsed) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)

"""The server itself, and reading, steering and generating with an attached set on it."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ndif_server import Server
from ndif_support import PROMPT
from ndif_wire import Wire

from nnsight_transcoders import (
    Transcoder,
    TranscoderConfig,
    TranscoderSet,
    ablate,
    attach,
    steer,
)

pytestmark = pytest.mark.ndif

#: What the same arithmetic in two processes may differ by.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_the_server_lacks_this_package_and_the_modes_are_what_they_say(
    model: Any, wire: Wire, mode: str
):
    found: Any = None
    with model.trace(PROMPT, remote=wire.url):
        import importlib.util

        spec = importlib.util.find_spec("nnsight_transcoders")
        found = [spec is None, model.lm_head.weight.device.type].save()
    assert found == [True, "cpu" if mode == "trusted" else "meta"]


def test_starting_a_running_server_changes_nothing(server: Server):
    before = server.processes()
    server.start()
    assert server.processes() == before
    with urllib.request.urlopen(f"{server.url}/ping", timeout=60) as answer:
        assert answer.status == 200


# -- attached sets -------------------------------------------------------------------------------


def features(replaced: Any, remote: str | None) -> list[torch.Tensor]:
    """Every layer's features, and the logits of the replaced model."""
    with torch.no_grad():
        with replaced.trace(PROMPT, remote=remote):
            found = [].save()
            for layer in range(4):
                found.append(replaced.transcoders[layer].features.output)
            found.append(replaced.output.logits)
    return found


def edited(replaced: Any, remote: str | None) -> list[torch.Tensor]:
    """Logits of two prompts of unequal length with a feature removed, strengthened and set."""
    prompts = [PROMPT, "The siege lasted from 1101 to 11"]
    with torch.no_grad():
        with replaced.trace(prompts, remote=remote):
            ablate(replaced, 0, [3, 4], positions=-1)
            steer(replaced, 1, 7, 2.0)
            replaced.transcoders[2].features.output[:, -1, 5] = 4.0
            logits = replaced.output.logits[:, -1].save()
    return [logits]


def generated(replaced: Any, remote: str | None) -> list[torch.Tensor]:
    """Features at every step of a generation that is steered at every step, and its tokens."""
    with torch.no_grad():
        with replaced.generate(PROMPT, max_new_tokens=3, do_sample=False, remote=remote) as tracer:
            found = [].save()
            for _step in tracer.iter[:3]:
                steer(replaced, 1, 7, 3.0, positions=-1)
                found.append(replaced.transcoders[2].features.output[:, -1])
            tokens = tracer.result.save()
    return [*found, tokens]


@pytest.mark.parametrize("use", [features, edited, generated], ids=lambda use: use.__name__)
@pytest.mark.parametrize("splice", ["replace", "replace+error"])
def test_the_same_numbers_as_here(
    model: Any,
    local: Any,
    transcoders: TranscoderSet,
    wire: Wire,
    splice: Any,
    use: Callable[[Any, str | None], list[torch.Tensor]],
):
    expected = use(attach(local, transcoders, mode=splice), None)
    found = use(attach(model, transcoders, mode=splice), wire.url)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(wire.jobs()) == 1


@pytest.mark.parametrize("use", [edited, generated], ids=lambda use: use.__name__)
@pytest.mark.parametrize("splice", ["replace", "replace+error"])
def test_autoencoders(
    model: Any,
    local: Any,
    wire: Wire,
    splice: Any,
    use: Callable[[Any, str | None], list[torch.Tensor]],
):
    """They read the place that they write."""
    made = {}
    torch.manual_seed(0)
    for layer in range(4):
        config = TranscoderConfig(128, 128, 64, layer=layer, input_site="O", output_site="O")
        made[layer] = Transcoder(config)
        for weight in made[layer].parameters():
            torch.nn.init.normal_(weight, std=0.3)
    chosen = TranscoderSet.from_transcoders(made)
    expected = use(attach(local, chosen, mode=splice), None)
    found = use(attach(model, chosen, mode=splice), wire.url)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(wire.jobs()) == 1


def test_some_layers_only(model: Any, local: Any, per_layer: TranscoderSet, wire: Wire):
    logits = []
    for run, remote in ((local, None), (model, wire.url)):
        replaced = attach(run, per_layer, layers=[1, 2])
        with torch.no_grad():
            with replaced.trace(PROMPT, remote=remote):
                value = replaced.output.logits.save()
        logits.append(value)
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    # Two layers' weights, not four.
    assert wire.jobs()[0].blob < 0.6 * sum(
        p.numel() * p.element_size() for layer in range(4) for p in per_layer[layer].parameters()
    )

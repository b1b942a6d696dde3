"""Sets that the real circuit-tracer reads as this package wrote them, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_transcoders import Transcoder, TranscoderConfig, TranscoderSet
from nnsight_transcoders.hub.circuit_tracer_save import save_circuit_tracer
from nnsight_transcoders.transcoder import CrossLayerPart

pytestmark = pytest.mark.peers
D, WIDTH, LAYERS = 16, 40, 3


def random_set(activation: str, *, skip: bool = False, cross_layer: bool = False) -> TranscoderSet:
    torch.manual_seed(0)
    modules: dict[int, Any] = {}
    for layer in range(LAYERS):
        config = TranscoderConfig(
            D, D, WIDTH, layer=layer, activation=activation, skip=skip, input_site="R"
        )
        threshold = torch.rand(WIDTH) if activation == "jumprelu" else None
        if cross_layer:
            modules[layer] = CrossLayerPart(config, tuple(range(layer, LAYERS)), threshold)
        else:
            modules[layer] = Transcoder(config, threshold)
        for name, weight in modules[layer].requires_grad_(False).named_parameters():
            if "threshold" not in name:
                weight.normal_()
    return TranscoderSet.from_transcoders(modules)


def computed(chosen: TranscoderSet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features and outputs of all layers, by this package."""
    with torch.no_grad():
        acts = {layer: chosen[layer].encode(x[layer]) for layer in chosen.layers}
        outputs = [chosen.decode(layer, acts, x[layer]) for layer in chosen.layers]
    return {"features": torch.stack(list(acts.values())), "output": torch.stack(outputs)}


KINDS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "skip": {"activation": "relu", "skip": True},
    "jumprelu-skip": {"activation": "jumprelu", "skip": True},
    "clt": {"activation": "relu", "cross_layer": True},
    "jumprelu-clt": {"activation": "jumprelu", "cross_layer": True},
}


OWN = ("relu", "jumprelu", "skip", "clt")
INPUTS = torch.randn(LAYERS, 20, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def results(circuit_tracer, tmp_path_factory):
    """What circuit-tracer computes with each of our sets and of its own, and where those are."""
    folder = tmp_path_factory.mktemp("sets")
    jobs = {
        kind: ("read", save_circuit_tracer(random_set(**options), folder / kind), INPUTS)
        for kind, options in KINDS.items()
    }
    own = {f"own-{kind}": (f"write-{kind}", folder / f"own-{kind}", INPUTS) for kind in OWN}
    return circuit_tracer({**jobs, **own}), folder


@pytest.mark.parametrize("kind", KINDS)
def test_circuit_tracer_reads_what_we_write(results, kind):
    for name, ours in computed(random_set(**KINDS[kind]), INPUTS).items():
        close(results[0][kind][name], ours)


@pytest.mark.parametrize("kind", OWN)
def test_we_read_what_circuit_tracer_writes(results, kind):
    folder = results[1] / f"own-{kind}"
    opened = TranscoderSet.from_pretrained(folder, input_site="R", output_site="O'")
    assert opened.provenance["format"] == "circuit-tracer"
    assert opened.layers == tuple(range(LAYERS))
    assert opened.cross_layer == (kind == "clt")
    assert opened.config(0).activation == ("jumprelu" if kind in ("jumprelu", "clt") else "relu")
    for name, ours in computed(opened, INPUTS).items():
        close(ours, results[0][f"own-{kind}"][name])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())

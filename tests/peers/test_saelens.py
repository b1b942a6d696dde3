"""Sets that the real SAELens reads as this package wrote them, and the other way round."""

from __future__ import annotations

import pytest
import torch

from nnsight_transcoders import Transcoder, TranscoderConfig, TranscoderSet
from nnsight_transcoders.hub.saelens_save import save_saelens

pytestmark = pytest.mark.peers
D, WIDTH = 16, 40


def random_set(activation: str, skip: bool, dtype: str) -> TranscoderSet:
    torch.manual_seed(0)
    modules = {}
    for layer in (0, 2):
        config = TranscoderConfig(
            D, D, WIDTH, layer=layer, activation=activation, skip=skip, dtype=dtype
        )
        shape = (WIDTH,) if activation == "jumprelu" else ()
        threshold = None if activation == "relu" else torch.rand(shape).to(getattr(torch, dtype))
        modules[layer] = Transcoder(config, threshold).requires_grad_(False)
        for name, weight in modules[layer].named_parameters():
            if "threshold" not in name:
                weight.normal_()
    return TranscoderSet.from_transcoders(modules)


KINDS = {
    f"{activation}-{'skip' if skip else 'plain'}-{dtype}": (activation, skip, dtype)
    for activation in ("relu", "jumprelu", "batchtopk")
    for skip in (False, True)
    for dtype in ("float32", "bfloat16")
}
INPUTS = torch.randn(20, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def results(saelens, tmp_path_factory):
    """What SAELens computes with each of our sets, and with one of its own (and where that is)."""
    folder = tmp_path_factory.mktemp("sets")
    jobs = {
        kind: ("read", save_saelens(random_set(*options), folder / kind), INPUTS)
        for kind, options in KINDS.items()
    }
    return saelens({**jobs, "own": ("write", folder / "own", INPUTS)}), folder / "own"


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_reads_what_we_write(results, kind):
    chosen, found = random_set(*KINDS[kind]), results[0][kind]
    dtype = getattr(torch, KINDS[kind][2])
    assert sorted(found) == ["features_0", "features_2", "output_0", "output_2"]
    for layer in chosen.layers:
        module, given = chosen[layer], INPUTS.to(dtype)
        for name, ours in (("features", module.encode(given)), ("output", module(given))):
            theirs, ours = found[f"{name}_{layer}"], ours.float()
            assert ours.norm() > 0
            limit = 1e-5 if dtype == torch.float32 else 2e-2
            assert float((theirs - ours).norm()) <= limit * float(ours.norm())


def test_we_read_what_saelens_writes(results):
    expected, folder = results[0]["own"], results[1]
    opened = TranscoderSet.from_pretrained(folder)
    assert opened.provenance["format"] == "saelens"
    assert [opened.config(n).activation for n in opened] == ["relu", "relu"] + ["jumprelu"] * 2
    assert [opened.config(n).skip for n in opened] == [False, True, False, True]
    for layer in opened.layers:
        config = opened.config(layer)
        assert (config.input_site, config.output_site) == ("N1", "O'")
        assert config.base_model == "owner/model"
        close(opened[layer].encode(INPUTS), expected[f"features_{layer}"])
        close(opened[layer](INPUTS), expected[f"output_{layer}"])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert float((found - expected).detach().norm()) <= 1e-5 * float(expected.norm())

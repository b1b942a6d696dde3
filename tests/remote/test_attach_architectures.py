"""Attached models in a remote job, on architectures that differ in where things are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from served import RestoredBackend

sys.path.insert(0, str(Path(__file__).parents[1]))

import attach_support as support
import zoo

from nnsight_transcoders import ablate, attach, scale, steer, verify
from nnsight_transcoders.attachment.remote_layers import RemoteTranscoders
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.site_stream import site_values


def block(replaced: Any, backend: Any, error: bool) -> list[Any]:
    ids = support.IDS[None]
    with torch.no_grad(), replaced.trace(ids, backend=backend):
        replaced.transcoders[1].features.output[:, -2:, 3] = 2.0
        steer(replaced, 2, 5, 1.0, positions=0)
        features = replaced.transcoders[2].features.output.clone().save()
        if error:
            replaced.transcoders[2].error.output = replaced.transcoders[2].error.output * 0.5
        logits = replaced.output.logits.save()
    return [features, logits]


@pytest.mark.parametrize("mode", ["replace", "replace+error"])
@pytest.mark.parametrize(
    ("name", "input_site", "output_site"),
    [
        ("gpt2", "N1", "O"),
        ("gpt2", "N0", "O"),  # a LayerNorm with gain and bias
        ("gemma2", "N0", "O'"),  # sandwich norms
        ("llama", "R", "O"),
        ("falcon", "N1", "O"),  # adds to the MLP's output in place
        ("gpt-neox", "R", "O"),  # attention and MLP side by side
        ("opt", "N1", "O"),  # no MLP module, rows flattened
    ],
)
def test_the_same_values(name, input_site, output_site, mode):
    model = support.model(name)
    chosen = support.transcoders(name, "cross-layer", input_site, output_site)
    replaced = attach(model, chosen, mode=mode)
    error = mode == "replace+error"
    expected = block(replaced, None, error)
    found = block(replaced, RestoredBackend(model), error)
    for one, other in zip(found, expected, strict=True):
        assert support.distance(one, other) <= 1e-4
    assert isinstance(replaced.transcoders, nnsight.Envoy)
    assert not isinstance(replaced.transcoders, RemoteTranscoders)


def autoencoder_block(replaced: Any, backend: Any, mode: str) -> list[Any]:
    """Every kind of edit: by assignment and in place, of a value and of a view of it."""
    ids = support.IDS[None]
    with torch.no_grad(), replaced.trace(ids, backend=backend):
        replaced.transcoders[0].pre_activations.output[..., 2] += 1.0
        first = replaced.transcoders[0].features.output.clone().save()
        last = replaced.transcoders[1].features.output[:, -2:]
        last[..., 3] = 2.0
        last.mul_(1.5)
        ablate(replaced, 1, [4, 5, 6])
        scale(replaced, 1, 7, -1.0)
        written = replaced.transcoders[1].reconstruction.output.clone().save()
        replaced.transcoders[1].reconstruction.output *= 0.8
        steer(replaced, 2, 5, 1.0, positions=0)
        features = replaced.transcoders[2].features.output.save()
        if mode != "replace":
            replaced.transcoders[2].error.output = replaced.transcoders[2].error.output * 0.5
        logits = replaced.output.logits.save()
    return [first, written, features, logits]


@pytest.mark.parametrize("mode", ["replace", "replace+error", "observe"])
@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("llama", "O"),
        ("gemma2", "O"),  # sandwich norms
        ("gemma2", "O'"),
        ("falcon", "O"),  # adds to the MLP's output in place
        ("gpt-neox", "O"),  # attention and MLP side by side
        ("opt", "O"),  # no MLP module, rows flattened
        ("bloom", "O"),  # the MLP adds the residual itself
    ],
)
def test_autoencoders(name, site, mode):
    """What they read is where they write: their edits are written at once."""
    model = support.model(name)
    chosen = support.transcoders(name, "per-layer", site, site)
    replaced = attach(model, chosen, mode=mode)
    expected = autoencoder_block(replaced, None, mode)
    found = autoencoder_block(replaced, RestoredBackend(model), mode)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor
        assert support.distance(one, other) <= 1e-4
    untouched = support.original_logits(name)[None]
    assert (support.distance(found[-1], untouched) <= 1e-4) == (mode == "observe")


def test_leading_positions_are_left_out():
    model = support.model("llama")
    chosen = support.transcoders("llama", leading_positions=2)
    replaced = attach(model, chosen)
    expected = block(replaced, None, False)
    found = block(replaced, RestoredBackend(model), False)
    for one, other in zip(found, expected, strict=True):
        assert support.distance(one, other) <= 1e-4


def test_half_precision():
    model = zoo.nnsight_model("llama")
    model._module.to(torch.bfloat16)
    chosen = support.transcoders("llama")
    replaced = attach(model, chosen, mode="replace+error")
    expected = block(replaced, None, True)
    found = block(replaced, RestoredBackend(model), True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt-neox", "opt", "falcon"])
def test_site_values_are_those_of_the_run(name):
    """What is read where a norm can only be called is what ``collect`` and its norms give."""
    run, model = support.run_of(name), support.model(name)
    layer = 1
    wanted = [(layer, "O'"), (layer, "R"), (layer, "N1"), (layer, "O"), (layer, "N0")]
    if name == "gpt-neox":
        wanted.remove((layer, "N0"))
    for remote in (None, "local"):
        if remote and not hasattr(model, "session"):
            continue
        values = site_values(model, wanted, support.IDS[None], remote=remote)
        assert list(values) == sorted(
            values, key=lambda w: ["R", "N0", "N1", "O", "O'"].index(w[1])
        )
        for site, expected in (
            ("R", run.mid),
            ("N1", run.mlp_in),
            ("O", run.mlp_out),
            ("O'", run.mlp_post),
        ):
            assert torch.equal(values[layer, site][0], expected[layer])
        if (layer, "N0") in values:
            norm = support.EXPECTED[name]
            path = support.expected_layer(norm, layer).mlp_norm
            expected = support.normalised(model._module.get_submodule(path), run.mid[layer])
            assert support.distance(values[layer, "N0"][0], expected) <= 1e-4


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("llama", "cross-layer", {"activation": "jointtopk", "k": 7}),
        ("gemma2", "skip", {"leading_positions": 1}),
        ("falcon", "per-layer", {}),
    ],
)
@pytest.mark.parametrize("max_bytes", [2**29, 2**13], ids=["set travels", "set stays"])
def test_verify(name, kind, config, max_bytes):
    model, chosen = support.model(name), support.transcoders(name, kind, **config)
    texts = [support.IDS.tolist(), [4, 8, 15, 16, 23, 42]]
    expected = verify(model, chosen, texts)
    found = verify(model, chosen, texts, remote=RemoteServer("local", max_bytes=max_bytes))
    assert found.ce == pytest.approx(expected.ce, rel=1e-4)
    assert found.ce_replaced == pytest.approx(expected.ce_replaced, rel=1e-4)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.fvu, one.l0) == pytest.approx((other.fvu, other.l0), rel=1e-3)
        assert (one.ce_change is None) == (other.ce_change is None)
        assert one.ce_change == pytest.approx(other.ce_change, abs=1e-4)
        assert one.hypothesis == other.hypothesis

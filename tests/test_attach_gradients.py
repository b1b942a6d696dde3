"""Backward passes through an attached model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from attach_support import IDS, PROMPT, WIDTH, Reference, distance, model, run_of, transcoders
from torch import Tensor

from nnsight_transcoders.attachment.edit import ablate, attach
from nnsight_transcoders.check import random_transcoders

SHORT = "w5 w9 w33"


def with_gradient(name: str, chosen: Any, layer: int) -> tuple[Reference, dict[str, Tensor]]:
    """A reference whose features of a layer are a leaf."""
    leaf: dict[str, Tensor] = {}

    def detach(acts: Tensor) -> Tensor:
        leaf["features"] = acts.detach().requires_grad_()
        return leaf["features"]

    return Reference(name, chosen, {layer: detach}), leaf


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_the_gradient_of_features_is_that_of_a_leaf_in_a_copy(name, kind):
    chosen = transcoders(name, kind)
    replaced = attach(model(name), chosen)
    with replaced.trace(IDS[None]):
        features = replaced.transcoders[1].features.output
        loss = replaced.output.logits[0, -1, 5]
        with loss.backward():
            gradient = features.grad[0].save()
    reference, leaf = with_gradient(name, chosen, 1)
    reference.output(grad=True)[0, -1, 5].backward()
    assert distance(gradient, leaf["features"].grad) <= 1e-4


def test_the_gradient_of_features_beside_the_error_is_the_models_along_the_decoder_rows():
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen, mode="replace+error")
    with replaced.trace(IDS[None]):
        features = replaced.transcoders[1].features.output
        loss = replaced.output.logits[0, -1, 5]
        with loss.backward():
            gradient = features.grad[0].save()
    leaf: dict[str, Tensor] = {}

    def shifted(y: Tensor, _: Tensor) -> Tensor:
        leaf["shift"] = torch.zeros(len(y), WIDTH, requires_grad=True)
        return y + leaf["shift"] @ chosen[1].W_dec

    outputs = {0: lambda y, _: y, 1: shifted, 2: lambda y, _: y}
    Reference("llama", chosen, outputs=outputs).output(grad=True)[0, -1, 5].backward()
    assert distance(gradient, leaf["shift"].grad) <= 1e-4


@pytest.mark.parametrize("write", ["in place", "assigned", "helper"])
def test_a_backward_pass_after_an_edit(write):
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen)
    with replaced.trace(IDS[None]):
        first = replaced.transcoders[0].features.output
        if write == "in place":
            replaced.transcoders[1].features.output[:, -1, :12] = 0
        elif write == "assigned":
            edited = replaced.transcoders[1].features.output.clone()
            edited[:, -1, :12] = 0
            replaced.transcoders[1].features.output = edited
        else:
            ablate(replaced, 1, range(12), positions=-1)
        loss = replaced.output.logits[0, -1, 5]
        with loss.backward():
            gradient = first.grad[0].save()
    reference, leaf = with_gradient("llama", chosen, 0)

    def without(acts: Tensor) -> Tensor:
        mask = torch.ones_like(acts)
        mask[-1, :12] = 0
        return acts * mask

    reference.edit_features[1] = without
    reference.output(grad=True)[0, -1, 5].backward()
    assert distance(gradient, leaf["features"].grad) <= 1e-4


def test_gradients_of_two_invokes():
    chosen = transcoders("llama")
    replaced = attach(model("llama"), chosen)
    with replaced.trace() as tracer:
        with tracer.invoke(SHORT):
            short = replaced.transcoders[1].features.output
            loss = replaced.output.logits[0, -1, 5]
            with loss.backward(retain_graph=True):
                found = short.grad[0].save()
        with tracer.invoke(PROMPT):
            replaced.output.save()
    reference, leaf = with_gradient("llama", chosen, 1)
    reference.output(torch.tensor(zoo.tokenizer()(SHORT)["input_ids"]), grad=True)[
        0, -1, 5
    ].backward()
    assert distance(found[-3:], leaf["features"].grad) <= 1e-4
    assert not found[:-3].any()


def test_sparse_features_have_the_gradient_of_the_dense_decoder():
    """Under two percent active, the decoder takes its sparse path; the gradient is the same."""
    rare = random_transcoders(run_of("llama"), "per-layer", d_transcoder=WIDTH)
    for layer in rare.layers:
        with torch.no_grad():
            rare[layer].b_enc[1:] -= (
                100  # at most feature 0 is active: 1 of 24, and 0 of them often
            )
            rare[layer].b_enc[0] -= 2
    replaced = attach(model("llama"), rare)
    with replaced.trace(IDS[None]):
        features = replaced.transcoders[1].features.output
        loss = replaced.output.logits[0, -1, 5]
        with loss.backward():
            gradient = features.grad[0].save()
        share = (features != 0).float().mean().save()
    assert share < 0.02
    leaf: dict[str, Tensor] = {}

    def shifted(_: Tensor, out: Tensor) -> Tensor:
        leaf["shift"] = torch.zeros(len(out), WIDTH, requires_grad=True)
        return out + leaf["shift"] @ rare[1].W_dec

    Reference("llama", rare, outputs={1: shifted}).output(grad=True)[0, -1, 5].backward()
    assert distance(gradient, leaf["shift"].grad) <= 1e-4

"""Attached models run by a process that has not this package: the same blocks, the same values.

``served`` runs what was deserialised in another process, where importing the package fails and
where nothing was mounted; the client's model has no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import nnsight
import pytest
import torch
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from served import PACKAGE, ServedModel, ServerError
from transformers import AutoTokenizer

from nnsight_transcoders import (
    Transcoder,
    TranscoderConfig,
    TranscoderSet,
    ablate,
    attach,
    builtin_model_path,
    resolve_sites,
    scale,
    set_features,
    steer,
)
from nnsight_transcoders.errors import InputError, PayloadTooLargeError
from nnsight_transcoders.remote.payload import ModelShape, estimate_payload

PROMPT = "The war lasted from 1732 to 17"
PROMPTS = [PROMPT, "She gave it to", "On"]
SETS = ["builtin/per-layer", "builtin/skip", "builtin/clt", "autoencoder"]
#: A block's values: a function of an attached model and of how to run it.
Block = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    started = ServedModel(builtin_model_path())
    yield started
    started.close()


@cache
def autoencoders() -> TranscoderSet:
    """Random ones: the package ships none."""
    made = {}
    torch.manual_seed(0)
    for layer in range(4):
        made[layer] = Transcoder(
            TranscoderConfig(128, 128, 128, layer=layer, input_site="O", output_site="O")
        )
        for weight in made[layer].parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return TranscoderSet.from_transcoders(made)


def transcoders(name: str) -> TranscoderSet:
    if name == "autoencoder":
        return autoencoders()
    return TranscoderSet.from_pretrained(name, dtype=torch.float32)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        difference = (one.double() - other.double()).norm()
        assert float(difference) <= 1e-4 * float(other.double().norm())


def both(block: Block, served: ServedModel, local: Any, model: Any, **attached: Any) -> list[Any]:
    """Run a block here and there; the values, which are the same."""
    name = attached.pop("name", "builtin/per-layer")
    with torch.no_grad():
        expected = block(attach(local, transcoders(name), **attached), lambda: None)
        found = block(attach(model, transcoders(name), **attached), served.backend)
    assert_same(found, expected)
    assert not model.dispatched
    return found


# -- blocks, as a user writes them ---------------------------------------------------------------


def reads(replaced: Any, backend: Any) -> list[Any]:
    with replaced.trace(PROMPT, backend=backend()):
        node = replaced.transcoders[2]
        pre = node.pre_activations.output.clone().save()
        features = node.features.output.clone().save()
        reconstruction = node.reconstruction.output.clone().save()
        logits = replaced.output.logits.save()
    return [pre, features, reconstruction, logits]


def edits(replaced: Any, backend: Any) -> list[Any]:
    with replaced.trace(PROMPT, backend=backend()):
        replaced.transcoders[1].features.output[:, -1, 5] = 3.0
        steer(replaced, 2, [3, 7], 1.5, positions=-1)
        scale(replaced, 2, 11, -1.0)
        after = replaced.transcoders[2].features.output.clone().save()
        replaced.transcoders[3].reconstruction.output *= 0.5
        logits = replaced.output.logits.save()
    return [after, logits]


def errors_edited(replaced: Any, backend: Any) -> list[Any]:
    with replaced.trace(PROMPT, backend=backend()):
        ablate(replaced, 1, list(range(100)))
        replaced.transcoders[2].error.output = replaced.transcoders[2].error.output * 0.3
        error = replaced.transcoders[3].error.output.clone().save()
        logits = replaced.output.logits.save()
    return [error, logits]


def invokes(replaced: Any, backend: Any) -> list[Any]:
    """Prompts of different lengths: padding, positions in each prompt's own tokens."""
    with replaced.trace(backend=backend()) as tracer:
        with tracer.invoke(PROMPTS[0]):
            set_features(replaced, 1, [4, 9], 2.0, positions=[1, -1])
            first = replaced.transcoders[1].features.output.clone().save()
            logits = replaced.output.logits.save()
        with tracer.invoke(PROMPTS[1]):
            replaced.transcoders[1].pre_activations.output[..., 4] = 2.0
            second = replaced.transcoders[1].features.output.clone().save()
            reconstruction = replaced.transcoders[2].reconstruction.output.clone().save()
        with tracer.invoke(PROMPTS[2]):
            index = replaced.transcoders[1].token_index.output.clone().save()
    return [first, logits, second, reconstruction, index]


def generation(replaced: Any, backend: Any) -> list[Any]:
    settings = {"max_new_tokens": 4, "do_sample": False}
    with replaced.generate(PROMPTS[:2], backend=backend(), **settings) as tracer:
        values = nnsight.save([])
        for _ in tracer.iter[:]:
            values.append(replaced.transcoders[0].token_index.output.clone())
            steer(replaced, 1, 5, 4.0, positions=-1)
            values.append(replaced.transcoders[1].features.output.clone())
    assert len(values) == 8
    return list(values)


def session(replaced: Any, backend: Any) -> list[Any]:
    with replaced.session(backend=backend()):
        with replaced.trace(PROMPT):
            features = replaced.transcoders[1].features.output
        with replaced.trace(PROMPT):
            replaced.transcoders[1].features.output = features * 2
            logits = replaced.output.logits.save()
    return [logits]


def stopped(replaced: Any, backend: Any) -> list[Any]:
    with replaced.trace(PROMPT, backend=backend()) as tracer:
        features = replaced.transcoders[1].features.output.clone().save()
        tracer.stop()
    return [features]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [reads, edits, invokes, generation, session, stopped])
def test_replace(block, name, served, local, model):
    both(block, served, local, model, name=name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [reads, edits, errors_edited, invokes, generation])
def test_replace_with_the_error(block, name, served, local, model):
    both(block, served, local, model, name=name, mode="replace+error")


def test_observe(served, local, model):
    both(edits, served, local, model, mode="observe", layers=[1, 2, 3])


def test_an_edit_stored_on_top_travels_too(served, local, model):
    def block(replaced: Any, backend: Any) -> list[Any]:
        with replaced.edit() as (_, edited):
            edited.transcoders[1].features.output[..., 5] = 3.0
        with edited.trace(PROMPT, backend=backend()):
            features = edited.transcoders[1].features.output.clone().save()
            logits = edited.output.logits.save()
        return [features, logits]

    features, _ = both(block, served, local, model)
    assert set(features[..., 5].flatten().tolist()) == {3.0}


# -- rows only -----------------------------------------------------------------------------------


def some(replaced: Any, backend: Any) -> list[Any]:
    with replaced.trace(PROMPT, backend=backend()):
        scale(replaced, 1, [156, 39], -2.0, positions=-1)
        set_features(replaced, 1, 7, 3.0)
        steer(replaced, 3, 2, 2.0)
        logits = replaced.output.logits.save()
    return [logits]


def test_single_features_are_their_rows_here_and_there(served, local, model):
    features = {1: [39, 7, 156], 3: [2]}
    (found,) = both(some, served, local, model, mode="replace+error", features=features)
    sent = served.sent[-1]
    with torch.no_grad():
        whole = attach(local, transcoders("builtin/per-layer"), mode="replace+error")
        (expected,) = some(whole, lambda: None)
        original = local.trace(PROMPT, trace=False).logits
    assert_same([found], [expected])
    assert float((found - original).abs().max()) > 0.1
    # Four rows of two matrices of width 128 in float32 are 4 kB; the rest is code and names.
    assert sent < 200_000
    some(attach(model, transcoders("builtin/per-layer"), mode="replace+error"), served.backend)
    assert served.sent[-1] - sent > 2_000_000


def test_single_features_of_an_autoencoder(served, local, model):
    features = {1: [39, 7, 95], 3: [2]}

    def block(replaced: Any, backend: Any) -> list[Any]:
        with replaced.trace(PROMPT, backend=backend()):
            set_features(replaced, 1, 7, 3.0, positions=[-1, 2])
            steer(replaced, 3, 2, 2.0)
            logits = replaced.output.logits.save()
        return [logits]

    settings: dict[str, Any] = {"name": "autoencoder", "mode": "replace+error"}
    (found,) = both(block, served, local, model, features=features, **settings)
    assert_same([found], both(block, served, local, model, **settings))
    with torch.no_grad():
        original = local.trace(PROMPT, trace=False).logits
    assert float((found - original).abs().max()) > 0.1


def test_rows_in_their_own_order(served, local, model):
    def block(replaced: Any, backend: Any) -> list[Any]:
        with replaced.trace(PROMPT, backend=backend()):
            values = replaced.transcoders[1].features.output.clone().save()
        return [values]

    features = {1: [156, 7, 39]}
    (found,) = both(block, served, local, model, mode="observe", features=features)
    (every,) = block(attach(local, transcoders("builtin/per-layer"), mode="observe"), lambda: None)
    assert_same([found], [every[..., [156, 7, 39]].detach()])


# -- what goes wrong -----------------------------------------------------------------------------


def test_the_server_has_not_the_package(served, model):
    with pytest.raises(ServerError, match=f"No module named '{PACKAGE}' on the server"):
        with model.trace(PROMPT, backend=served.backend()):
            import nnsight_transcoders

            value = nnsight.save(nnsight_transcoders.__version__)
            del value


@pytest.mark.parametrize("name", ["builtin/per-layer", "autoencoder"])
def test_an_error_changed_in_place_is_said(name, served, model):
    replaced = attach(model, transcoders(name), mode="replace+error")
    with pytest.raises(ServerError, match=r"error of layer 1 was changed in place.*assign it"):
        with replaced.trace(PROMPT, backend=served.backend()):
            replaced.transcoders[1].error.output[:] = 0


@pytest.mark.parametrize("name", ["builtin/per-layer", "autoencoder"])
def test_features_after_the_reconstruction_are_said(name, served, model):
    replaced = attach(model, transcoders(name))
    with pytest.raises(ServerError, match="features of layer 1 come before its reconstruction"):
        with replaced.trace(PROMPT, backend=served.backend()):
            _ = replaced.transcoders[1].reconstruction.output
            replaced.transcoders[1].features.output[:] = 0


def test_there_is_no_error_in_replace_mode(served, model):
    replaced = attach(model, transcoders("builtin/per-layer"))
    with pytest.raises(ServerError, match="no error in mode 'replace'"):
        with replaced.trace(PROMPT, backend=served.backend()):
            _ = replaced.transcoders[1].error.output


def test_a_feature_that_was_not_attached_is_named(served, model):
    chosen = transcoders("builtin/per-layer")
    replaced = attach(model, chosen, mode="replace+error", features={1: [5]})
    with pytest.raises(ServerError, match=r"only the features \[5\] attached, got \[6\]"):
        with replaced.trace(PROMPT, backend=served.backend()):
            ablate(replaced, 1, 6)


def test_weights_above_the_bound_are_not_sent(served, model):
    replaced = attach(model, transcoders("builtin/per-layer"))
    replaced.transcoders.max_bytes = 10_000
    before = len(served.sent)
    with pytest.raises(PayloadTooLargeError, match=r"have 3\.2 MB.*features=.*read_features"):
        with replaced.trace(PROMPT, backend=served.backend()):
            replaced.transcoders[1].features.output.save()
    assert len(served.sent) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "replace", "features": {1: [3]}}, "cannot replace an MLP"),
        ({"mode": "observe", "features": {1: [768]}}, r"features 0 to 767, got \[768\]"),
        ({"mode": "observe", "features": {1: []}}, "names no feature"),
        ({"mode": "observe", "features": {9: [1]}}, "not 9"),
        ({"mode": "observe", "features": {1: [3]}, "layers": [2]}, "names layers"),
    ],
)
def test_features_that_cannot_be_had_alone(options, message, local):
    with pytest.raises(InputError, match=message):
        attach(local, transcoders("builtin/per-layer"), **options)


def test_features_that_compete_cannot_be_had_alone(local):
    with pytest.raises(InputError, match=r"compete with each other \(activation 'topk'\)"):
        attach(local, transcoders("builtin/skip"), mode="observe", features={1: [3]})


# -- a model that is loaded later ----------------------------------------------------------------


def test_a_model_attached_before_it_was_loaded():
    """A run here loads the weights, also for the model that transcoders were attached to."""
    path = builtin_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = nnsight.TransformersModel(path, task="text-generation", tokenizer=tokenizer)
    replaced = attach(model, transcoders("builtin/per-layer"))
    assert not model.dispatched
    with torch.no_grad():
        (found,) = reads(replaced, lambda: None)[3:]
        assert model.dispatched
        assert model._module is replaced._module
        original = model.trace(PROMPT, trace=False).logits
        again = reads(replaced, lambda: None)[3]
    assert torch.equal(found, again)
    assert float((found - original).abs().max()) > 0.01


# -- sizes ---------------------------------------------------------------------------------------


class Sizes(Backend):
    """Packs a request as it would be sent, and keeps its size."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, tracer: Any) -> None:
        self.sizes.append(len(RequestModel.serialize(tracer, compress=True)))


@pytest.mark.parametrize(
    ("attached", "kind", "numbers"),
    [
        ({"features": {1: [5]}}, "rows", {"n_features": 1}),
        ({"features": {1: list(range(100))}}, "rows", {"n_features": 100}),
        ({"layers": [1]}, "weights", {"n_layers": 1, "d_transcoder": 768}),
        ({}, "weights", {"d_transcoder": 768}),
    ],
    ids=["one feature", "100 features", "one layer", "all layers"],
)
def test_what_is_sent_is_what_was_estimated(attached, kind, numbers, model):
    stored = TranscoderSet.from_pretrained("builtin/per-layer")
    replaced = attach(model, stored, mode="replace+error", **attached)
    packed = Sizes()
    with replaced.trace(PROMPT, backend=packed):
        steer(replaced, 1, 5, 1.0)
    shape = ModelShape.of(model._module, resolve_sites(model))
    expected = estimate_payload(kind, shape, **numbers).up
    assert packed.sizes == [pytest.approx(expected, rel=0.2)]

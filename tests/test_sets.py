"""``TranscoderSet``: what is loaded when, what is converted, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError, MismatchError
from nnsight_transcoders.layer_sources import Rows
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import (
    CrossLayerPart,
    CrossLayerTranscoder,
    Transcoder,
    TranscoderConfig,
)

D_MODEL, WIDTH = 6, 10


def transcoder(layer: int, seed: int = 0, **options: Any) -> Transcoder:
    """A random transcoder that needs gradients, as a user's own module does."""
    shape = {"d_in": D_MODEL, "d_out": D_MODEL, "d_transcoder": WIDTH}
    return fill(Transcoder(TranscoderConfig(layer=layer, **(shape | options))), seed + layer)


def part(layer: int, targets: tuple[int, ...], **options: Any) -> CrossLayerPart:
    """A random part of a cross-layer transcoder."""
    config = TranscoderConfig(
        d_in=D_MODEL, d_out=D_MODEL, d_transcoder=WIDTH, layer=layer, **options
    )
    return fill(CrossLayerPart(config, targets), layer)


def fill(module: Any, seed: int) -> Any:
    """Random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return module


def cross_layer_set(**options: Any) -> TranscoderSet:
    """A cross-layer set over layers 0, 1 and 3."""
    layers = (0, 1, 3)
    return TranscoderSet.from_transcoders(
        {s: part(s, tuple(t for t in layers if t >= s), **options) for s in layers}
    )


class CountingSource:
    """A ``LayerSource`` that makes a layer when it is asked for and writes down every request."""

    def __init__(self, layers: tuple[int, ...], **options: Any) -> None:
        self.options = options
        self.configs: Mapping[int, TranscoderConfig] = {
            layer: transcoder(layer, **options).config for layer in layers
        }
        self.provenance: Mapping[str, Any] = {"repository": "someone/set", "revision": "abc"}
        self.loads: list[int] = []
        self.row_reads: list[tuple[int, list[int], str]] = []

    def load(self, layer: int) -> Transcoder:
        self.loads.append(layer)
        return transcoder(layer, **self.options)

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        self.row_reads.append((layer, indices.tolist(), which))
        module = transcoder(layer, **self.options)
        weight = module.W_enc if which == "encoder" else module.W_dec
        return weight.detach()[indices]


# -- laziness ------------------------------------------------------------------------------------


def test_nothing_is_loaded_by_looking_at_a_set():
    source = CountingSource((3, 0, 2))
    transcoders = TranscoderSet(source)
    assert transcoders.layers == (0, 2, 3)
    assert list(transcoders) == [0, 2, 3]
    assert len(transcoders) == 3
    assert 2 in transcoders
    assert 1 not in transcoders
    assert transcoders.config(2).layer == 2
    assert transcoders.targets(2) == (2,)
    assert "someone/set" in repr(transcoders)
    transcoders.check_model(D_MODEL, 4, "Model")
    transcoders.subset([0]).to(dtype=torch.float64)
    transcoders.rows(2, [1])
    assert source.loads == []


def test_indexing_loads_a_layer_once_and_load_does_so_every_time():
    source = CountingSource((0, 1))
    transcoders = TranscoderSet(source)
    assert transcoders[1] is transcoders[1]
    assert source.loads == [1]
    transcoders.load(0)
    transcoders.load(0)
    assert source.loads == [1, 0, 0]
    assert transcoders.load(1) is transcoders[1]
    assert source.loads == [1, 0, 0]


def test_converted_sets_load_for_themselves_and_keep_what_they_converted():
    source = CountingSource((0, 1))
    doubled = TranscoderSet(source).to(dtype=torch.float64)
    assert source.loads == []
    assert doubled[0] is doubled[0]
    assert source.loads == [0]


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_rows_are_read_from_the_source_until_the_layer_is_loaded(which):
    source = CountingSource((0, 1))
    transcoders = TranscoderSet(source)
    module = transcoder(1)
    weight = module.W_enc if which == "encoder" else module.W_dec
    found = transcoders.rows(1, [7, 0, 7], which)
    assert torch.equal(found, weight[[7, 0, 7]])
    assert source.row_reads == [(1, [7, 0, 7], which)]
    transcoders[1]
    assert torch.equal(transcoders.rows(1, torch.tensor([3]), which), weight[[3]])
    assert len(source.row_reads) == 1
    assert not found.requires_grad
    assert not transcoders.rows(1, [3], which).requires_grad


def test_rows_have_the_sets_dtype():
    transcoders = TranscoderSet(CountingSource((0,)), dtype=torch.bfloat16)
    assert transcoders.rows(0, [1]).dtype == torch.bfloat16
    transcoders[0]
    assert transcoders.rows(0, [1]).dtype == torch.bfloat16


def test_no_rows():
    assert TranscoderSet(CountingSource((0,))).rows(0, []).shape == (0, D_MODEL)


def test_rows_of_a_cross_layer_set_hold_one_column_per_target():
    transcoders = cross_layer_set()
    assert torch.equal(transcoders.rows(1, [4, 2]), part(1, (1, 3)).W_dec[[4, 2]])
    assert transcoders.rows(0, [4, 2]).shape == (2, 3, D_MODEL)
    assert transcoders.rows(0, [4, 2], "encoder").shape == (2, D_MODEL)


@pytest.mark.parametrize("index", [-1, WIDTH])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_row_that_is_not_there(index, loaded):
    transcoders = TranscoderSet(CountingSource((2,)))
    if loaded:
        transcoders[2]
    with pytest.raises(InputError, match=rf"layer 2 has features 0 to {WIDTH - 1}.* {index}"):
        transcoders.rows(2, [0, index])


# -- subsets -------------------------------------------------------------------------------------


def test_a_subset_has_some_layers_and_the_same_source():
    source = CountingSource((0, 1, 2, 3))
    some = TranscoderSet(source, dtype=torch.bfloat16).subset([3, 1, 3])
    assert some.layers == (1, 3)
    assert some.provenance == dict(source.provenance)
    assert some[3].W_enc.dtype == torch.bfloat16
    assert source.loads == [3]
    assert torch.equal(some.rows(1, [0]), transcoder(1).W_dec[[0]].bfloat16())
    with pytest.raises(InputError, match=r"\[1, 3\], not 0"):
        some[0]


def test_a_subset_of_layers_that_are_not_there_names_them():
    with pytest.raises(InputError, match=r"\[0, 1\], not 5"):
        TranscoderSet(CountingSource((0, 1))).subset([0, 5])


def test_a_subset_without_layers_is_refused():
    with pytest.raises(ConfigError, match="at least one layer"):
        TranscoderSet(CountingSource((0, 1))).subset([])


def test_a_cross_layer_set_is_not_cut():
    transcoders = cross_layer_set()
    assert transcoders.subset([3, 0, 1]).layers == (0, 1, 3)
    with pytest.raises(InputError, match="cross-layer set cannot be cut"):
        transcoders.subset([0, 1])


# -- dtype and device ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: transcoder(0, skip=True), lambda: part(0, (0,))])
def test_converting_leaves_the_users_module_as_it_is(make):
    mine = make()
    before = {name: weight.clone() for name, weight in mine.state_dict().items()}
    transcoders = TranscoderSet.from_transcoders({0: mine})
    converted = transcoders.to(dtype=torch.bfloat16)[0]
    assert {w.dtype for w in converted.state_dict().values()} == {torch.bfloat16}
    assert converted.config.dtype == "bfloat16"
    assert converted.W_enc.requires_grad
    for name, weight in mine.state_dict().items():
        assert torch.equal(weight, before[name])
        assert weight.dtype == torch.float32
        assert torch.equal(converted.state_dict()[name], before[name].bfloat16())
    assert mine.config.dtype == "float32"
    assert transcoders[0] is mine


@pytest.mark.parametrize("grad", [True, False])
def test_a_converted_module_needs_gradients_where_the_users_does(grad):
    mine = transcoder(0).requires_grad_(grad)
    converted = TranscoderSet.from_transcoders({0: mine}).to(dtype=torch.float64)[0]
    assert {weight.requires_grad for weight in converted.parameters()} == {grad}


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "jumprelu"},
        {"activation": "batchtopk"},
        {"activation": "topk", "k": 3, "relu_first": False},
        {"activation": "grouptopk", "k": 1, "n_groups": 2},
    ],
)
def test_a_converted_module_computes_the_same(options):
    mine = transcoder(0, skip=True, **options)
    x = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(1))
    converted = TranscoderSet.from_transcoders({0: mine}).load(0, dtype=torch.float64)
    torch.testing.assert_close(converted(x.double()).float(), mine(x))
    assert converted(x).dtype == torch.float32


def test_load_can_override_the_dtype_for_one_call():
    transcoders = TranscoderSet(CountingSource((0,)), dtype=torch.bfloat16)
    assert transcoders.load(0, dtype=torch.float64).W_enc.dtype == torch.float64
    assert transcoders.load(0).W_enc.dtype == torch.bfloat16
    assert transcoders[0].W_enc.dtype == torch.bfloat16


def test_a_finer_dtype_does_not_come_from_what_was_kept_in_a_coarser_one():
    transcoders = TranscoderSet(CountingSource((0,)), dtype=torch.bfloat16)
    transcoders[0]
    assert torch.equal(transcoders.load(0, dtype=torch.float32).W_enc, transcoder(0).W_enc)


def test_layers_go_to_the_sets_device():
    mine = transcoder(0)
    transcoders = TranscoderSet.from_transcoders({0: mine}).to("meta")
    assert {weight.device.type for weight in transcoders[0].state_dict().values()} == {"meta"}
    assert transcoders.rows(0, [1]).device.type == "meta"
    assert mine.W_enc.device.type == "cpu"


# -- damaged weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip"])
def test_a_weight_that_is_not_finite_is_named(name, value):
    damaged = transcoder(2, skip=True)
    with torch.no_grad():
        getattr(damaged, name).view(-1)[1] = value
    transcoders = TranscoderSet.from_transcoders({2: damaged})
    for load in (transcoders.load, transcoders.__getitem__):
        with pytest.raises(CheckpointError, match=f"layer 2's weight {name} "):
            load(2)


def test_a_threshold_that_is_not_finite_is_named():
    damaged = transcoder(0, activation="jumprelu")
    with torch.no_grad():
        damaged.activation.threshold[0] = float("nan")
    with pytest.raises(CheckpointError, match="threshold"):
        TranscoderSet.from_transcoders({0: damaged})[0]


# -- sets that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, [f"d_in={D_MODEL}", "d_model=99", "GPT", "layer 1"]),
        ({"base_model": "someone/base"}, ["someone/base"]),
        ({"d_in": 99}, [f"d_out={D_MODEL}", "d_model=99"]),
    ],
)
def test_a_set_of_another_width_names_both(options, named):
    transcoders = TranscoderSet.from_transcoders({1: transcoder(1, **options)})
    with pytest.raises(MismatchError) as caught:
        transcoders.check_model(99, 12, "GPT")
    for text in named:
        assert text in str(caught.value)


def test_a_set_with_more_layers_than_the_model_names_both():
    transcoders = TranscoderSet.from_transcoders({0: transcoder(0), 7: transcoder(7)})
    with pytest.raises(MismatchError, match=r"up to 7, but GPT has 6 layers \(0 to 5\)"):
        transcoders.check_model(D_MODEL, 6, "GPT")
    transcoders.check_model(D_MODEL, 8, "GPT")


def test_per_layer_and_cross_layer_transcoders_do_not_mix():
    with pytest.raises(ConfigError, match="either per-layer or cross-layer"):
        TranscoderSet.from_transcoders({0: transcoder(0), 1: part(1, (1,))})


def test_an_empty_set_is_refused():
    with pytest.raises(ConfigError, match="at least one layer"):
        TranscoderSet.from_transcoders({})


@pytest.mark.parametrize("verb", ["__getitem__", "load", "config", "targets"])
def test_a_layer_that_is_not_there_is_refused_by_every_verb(verb):
    transcoders = TranscoderSet(CountingSource((0, 2)))
    with pytest.raises(InputError, match=r"layers \[0, 2\], not 1"):
        getattr(transcoders, verb)(1)
    with pytest.raises(InputError, match=r"layers \[0, 2\], not 1"):
        transcoders.rows(1, [0])


# -- cross-layer ---------------------------------------------------------------------------------


def test_targets_are_the_sets_own_later_layers():
    transcoders = cross_layer_set()
    assert transcoders.cross_layer
    assert [transcoders.targets(layer) for layer in transcoders] == [(0, 1, 3), (1, 3), (3,)]


@pytest.mark.parametrize("skip", [False, True])
def test_decode_of_a_set_is_the_sum_over_the_layers_below(skip):
    transcoders = cross_layer_set(skip=skip)
    x = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(1))
    acts = {layer: transcoders[layer].encode(x) for layer in transcoders}
    own = transcoders[3]
    expected = own.b_dec + sum(
        acts[s] @ transcoders[s].W_dec[:, transcoders.targets(s).index(3)] for s in (0, 1, 3)
    )
    if skip:
        expected = expected + x @ own.W_skip.T
    torch.testing.assert_close(transcoders.decode(3, acts, x), expected)
    one = transcoders.cross_layer_transcoder()
    torch.testing.assert_close(transcoders.decode(3, acts, x), one.decode(acts, 3, x))


def test_decode_of_a_per_layer_set_is_the_layers_own():
    transcoders = TranscoderSet.from_transcoders({1: transcoder(1, skip=True)})
    x = torch.randn(2, D_MODEL)
    acts = transcoders[1].encode(x)
    expected = acts @ transcoders[1].W_dec + transcoders[1].b_dec + x @ transcoders[1].W_skip.T
    torch.testing.assert_close(transcoders.decode(1, {1: acts}, x), expected)


def test_a_cross_layer_transcoder_makes_a_set_and_comes_back():
    one = CrossLayerTranscoder({0: part(0, (0, 1)), 1: part(1, (1,))})
    transcoders = TranscoderSet.from_transcoders(one)
    assert transcoders.layers == (0, 1)
    back = transcoders.cross_layer_transcoder()
    assert back.state_dict().keys() == one.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)


def test_a_per_layer_set_has_no_cross_layer_transcoder():
    source = CountingSource((0,))
    with pytest.raises(InputError, match="per-layer set"):
        TranscoderSet(source).cross_layer_transcoder()
    assert source.loads == []


# -- repr ----------------------------------------------------------------------------------------


def test_repr_says_what_is_in_the_set():
    options = {"activation": "topk", "k": 3, "input_site": "R", "output_site": "O'"}
    text = repr(TranscoderSet(CountingSource((0, 1, 2, 5, 7, 8), **options)))
    for shown in ("per-layer", "0-2,5,7-8", f"d_model={D_MODEL}", f"d_transcoder={WIDTH}"):
        assert shown in text
    for shown in ("topk", "R->O'", "someone/set"):
        assert shown in text
    assert "cross-layer" in repr(cross_layer_set())
    skip = TranscoderSet.from_transcoders({0: transcoder(0, skip=True)})
    assert "(skip," in repr(skip)
    assert "from memory" in repr(skip)


def test_provenance_is_a_copy():
    source = CountingSource((0,))
    TranscoderSet(source).provenance["revision"] = "other"
    assert source.provenance["revision"] == "abc"


# -- features chosen over all layers together ----------------------------------------------------


JOINT = {"activation": "jointtopk", "k": 5}


def test_encode_gives_each_layers_features_without_keeping_it():
    source = CountingSource((0, 2), leading_positions=1)
    transcoders = TranscoderSet(source)
    x = torch.randn(2, 4, D_MODEL, generator=torch.Generator().manual_seed(0))
    found = transcoders.encode({2: x})
    expected = transcoder(2).encode(x)
    expected[:, :1] = 0
    torch.testing.assert_close(found[2], expected)
    transcoders.encode({2: x})
    assert source.loads == [2, 2]


def test_jointly_chosen_features_are_those_that_write_the_most():
    transcoders = TranscoderSet(CountingSource((0, 1), **JOINT))
    assert transcoders.joint_k == 5
    assert TranscoderSet(CountingSource((0, 1))).joint_k is None
    generator = torch.Generator().manual_seed(0)
    x = {layer: torch.randn(3, D_MODEL, generator=generator) for layer in (0, 1)}
    found = transcoders.encode(x)
    score = torch.cat([(transcoder(n).encode(x[n])) * transcoder(n).decoder_norms() for n in x], 1)
    kept = torch.zeros_like(score).scatter_(1, score.topk(5).indices, 1.0).bool() & (score > 0)
    assert torch.equal(torch.cat([found[0], found[1]], 1) > 0, kept)


def test_layers_that_choose_together_need_each_other():
    transcoders = TranscoderSet(CountingSource((0, 1), **JOINT))
    with pytest.raises(InputError, match=r"layers \[0, 1\], got \[1\]"):
        transcoders.encode({1: torch.zeros(1, D_MODEL)})
    with pytest.raises(InputError, match="cannot be cut"):
        transcoders.subset([1])
    assert transcoders.subset([1, 0]).joint_k == 5


@pytest.mark.parametrize("other", [{"activation": "relu"}, {**JOINT, "k": 6}])
def test_layers_that_choose_together_must_agree(other):
    with pytest.raises(ConfigError, match="with one k, got 5, (6|None)"):
        TranscoderSet.from_transcoders({0: transcoder(0, **JOINT), 1: transcoder(1, **other)})

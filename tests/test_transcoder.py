"""Transcoders against their formulas, spelled out in loops in double precision."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.errors import ConfigError, InputError
from nnsight_transcoders.transcoder import (
    CrossLayerPart,
    CrossLayerTranscoder,
    FeatureEncoder,
    Transcoder,
    TranscoderConfig,
    sparse_decode,
    torch_dtype,
)

D_IN, D_OUT, WIDTH = 6, 5, 40
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {},
    "topk": {"k": 3},
    "topk-signed": {"k": 3, "relu_first": False},
    "batchtopk": {},
    "grouptopk": {"k": 1, "n_groups": 4},
}


def config(activation: str = "relu", **changes: Any) -> TranscoderConfig:
    """A small config with different widths on each side, so that no transpose can hide."""
    options = {
        "d_in": D_IN,
        "d_out": D_OUT,
        "d_transcoder": WIDTH,
        "activation": activation.removesuffix("-signed"),
        **OPTIONS[activation],
    }
    return TranscoderConfig(**(options | changes))


def randomise(module: FeatureEncoder, seed: int = 0) -> Any:
    """Random weights, with thresholds that some pre-activations pass and some do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise.abs() * 0.5 if name.endswith("threshold") else noise)
    return module


def make(activation: str = "relu", seed: int = 0, **changes: Any) -> Transcoder:
    """A random transcoder."""
    return randomise(Transcoder(config(activation, **changes)), seed)


def inputs(*shape: int, width: int = D_IN, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random input-site values ``(*shape, width)``."""
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def activate(module: FeatureEncoder, z: list[float]) -> list[float]:
    """The activation of one position, in plain numbers."""
    c = module.config
    if c.activation in ("jumprelu", "batchtopk"):
        thresholds = module.activation.threshold.double().expand(WIDTH).tolist()
        kept = [v if v > t else 0.0 for v, t in zip(z, thresholds, strict=True)]
        return [max(v, 0.0) for v in kept] if c.activation == "batchtopk" else kept
    if c.activation == "relu" or c.relu_first:
        z = [max(v, 0.0) for v in z]
    if c.activation == "relu":
        return z
    size = WIDTH // (c.n_groups or 1)
    chosen: set[int] = set()
    for start in range(0, WIDTH, size):
        group = sorted(range(start, start + size), key=lambda i: z[i], reverse=True)
        chosen |= set(group[: c.k])
    return [v if i in chosen else 0.0 for i, v in enumerate(z)]


def reference_encode(module: FeatureEncoder, x: Tensor) -> Tensor:
    """``act(W_enc x + b_enc)`` of each position ``(n, d_in)``, one number at a time."""
    W, b = module.W_enc.tolist(), module.b_enc.tolist()
    rows = []
    for position in x.double().tolist():
        z = [sum(w * v for w, v in zip(W[i], position, strict=True)) + b[i] for i in range(WIDTH)]
        rows.append(activate(module, z))
    return torch.tensor(rows, dtype=torch.float64)


def reference_output(module: Transcoder, x: Tensor) -> Tensor:
    """``sum_i a_i W_dec[i] + b_dec (+ W_skip x)`` of each position ``(n, d_in)``."""
    W_dec, b_dec = module.W_dec.tolist(), module.b_dec.tolist()
    W_skip = [[0.0] * D_IN] * D_OUT if module.W_skip is None else module.W_skip.tolist()
    rows = []
    for acts, position in zip(
        reference_encode(module, x).tolist(), x.double().tolist(), strict=True
    ):
        rows.append(
            [
                b_dec[j]
                + sum(acts[i] * W_dec[i][j] for i in range(WIDTH))
                + sum(W_skip[j][i] * position[i] for i in range(D_IN))
                for j in range(D_OUT)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", OPTIONS)
def test_the_output_is_what_the_formula_says(activation, skip):
    module, x = make(activation, skip=skip), inputs(4)
    acts = reference_encode(module, x)
    assert 0 < acts.count_nonzero() < acts.numel()
    torch.testing.assert_close(module.encode(x).double(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        module(x).double(), reference_output(module, x), rtol=1e-5, atol=1e-5
    )


def test_pre_activations_are_affine_and_encode_applies_the_activation_to_them():
    module, x = make("topk"), inputs(2, 3)
    expected = torch.einsum("bpd,fd->bpf", x, module.W_enc) + module.b_enc
    torch.testing.assert_close(module.pre_activations(x), expected)
    assert torch.equal(module.encode(x), module.activation(module.pre_activations(x)))


def test_the_skip_path_is_added_to_the_output_only():
    plain, x = make(), inputs(3)
    skip = Transcoder(config(skip=True))
    skip.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        skip.W_skip.copy_(inputs(D_OUT))
    assert torch.equal(skip.encode(x), plain.encode(x))
    torch.testing.assert_close(skip(x) - plain(x), x @ skip.W_skip.T)


# -- the sparse decoder --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", OPTIONS)
def test_sparse_and_dense_decoding_agree_for_any_batch(activation, skip, shape):
    module, x = make(activation, skip=skip), inputs(*shape)
    acts = module.encode(x)
    sparse = module.decode(acts, x, sparse=True)
    assert sparse.shape == (*shape, D_OUT)
    torch.testing.assert_close(sparse, module.decode(acts, x, sparse=False))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_active_feature_decodes_to_the_bias(rows):
    module = make()
    found = module.decode(torch.zeros(rows, WIDTH), sparse=True)
    assert torch.equal(found, module.b_dec.expand(rows, D_OUT))


def test_a_position_without_features_between_positions_that_have_some():
    module = make()
    acts = torch.zeros(4, WIDTH)
    acts[1, [2, 9]], acts[3, 0] = torch.tensor([1.0, -2.0]), 3.0
    found = sparse_decode(acts, module.W_dec)
    assert torch.equal(found[[0, 2]], torch.zeros(2, D_OUT))
    torch.testing.assert_close(found[1], module.W_dec[2] - 2 * module.W_dec[9])
    torch.testing.assert_close(found[3], 3 * module.W_dec[0])


def gradients(module: Transcoder, sparse: bool) -> dict[str, Tensor]:
    """Gradients of a fixed function of the output on every weight and on the input."""
    x = inputs(2, 3).requires_grad_()
    module.zero_grad()
    out = module.decode(module.encode(x), x, sparse=sparse)
    (out * inputs(2, 3, width=D_OUT)).sum().backward()
    return {"x": x.grad} | {
        name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("activation", OPTIONS)
def test_sparse_and_dense_decoding_have_the_same_gradients(activation):
    module = make(activation, skip=True)
    dense, sparse = gradients(module, sparse=False), gradients(module, sparse=True)
    assert set(dense) == set(sparse) >= {"x", "W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
    for name, grad in dense.items():
        assert grad.any(), name
        torch.testing.assert_close(sparse[name], grad, msg=name)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_feature_that_is_zero_has_a_gradient_too(sparse):
    module, acts = make(), torch.zeros(2, WIDTH)
    acts[0, 3] = 1.0
    acts.requires_grad_()
    module.decode(acts, sparse=sparse).sum().backward()
    torch.testing.assert_close(acts.grad, module.W_dec.sum(-1).expand(2, WIDTH))


def test_the_sparse_decoder_passes_numeric_differentiation_twice():
    acts = torch.tensor([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.5]], dtype=torch.float64)
    table = inputs(6, width=2).double().requires_grad_()
    fixed = acts.clone()
    active = acts.clone().requires_grad_()

    def decode(table_: Tensor) -> Tensor:
        return sparse_decode(fixed, table_, stride=2, offset=1)

    assert torch.autograd.gradcheck(decode, table)
    out = sparse_decode(active, table, stride=2, offset=1)
    (first,) = torch.autograd.grad(out.pow(2).sum(), active, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), active)
    rows = table.detach()[1::2]
    torch.testing.assert_close(second, 2 * (rows @ rows.T).sum(0).expand(2, 3))


def test_which_decoder_is_used_by_default_follows_the_share_of_active_features(monkeypatch):
    import nnsight_transcoders.transcoder as module_of

    calls = []
    original = module_of.sparse_decode

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module_of, "sparse_decode", counted)
    module = randomise(Transcoder(config(d_transcoder=200)))
    few, many = torch.zeros(1, 200), torch.ones(1, 200)
    few[0, :3] = 1  # 1.5 % active
    module.decode(few)
    assert len(calls) == 1
    module.decode(many)
    assert len(calls) == 1


# -- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_features_have_the_weights_dtype_and_the_output_has_the_inputs(
    activation, dtype, input_dtype
):
    module = make(activation, dtype=dtype, skip=True)
    x = inputs(2, 3, dtype=input_dtype)
    assert module.W_enc.dtype == module.b_dec.dtype == module.W_skip.dtype == torch_dtype(dtype)
    assert module.encode(x).dtype == torch_dtype(dtype)
    assert module(x).dtype == input_dtype
    reference = module.double()(x.double())
    error = (module.to(torch_dtype(dtype))(x).double() - reference).norm() / reference.norm()
    coarse = torch.bfloat16 in (torch_dtype(dtype), input_dtype)
    half = torch.float16 in (torch_dtype(dtype), input_dtype)
    assert error < (0.1 if coarse else 0.02 if half else 1e-5)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_decoders_work_in_half_precision(dtype, sparse):
    module = make("topk", dtype=dtype)
    acts = module.encode(inputs(2, 3, dtype=torch_dtype(dtype)))
    found = module.decode(acts, sparse=sparse)
    assert found.dtype == torch_dtype(dtype)
    expected = acts.double() @ module.W_dec.double() + module.b_dec.double()
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_a_threshold_that_is_given_keeps_its_dtype(activation):
    threshold = torch.full((WIDTH,) if activation == "jumprelu" else (), 0.3)
    module = Transcoder(config(activation, dtype="bfloat16"), threshold)
    assert module.activation.threshold.dtype == torch.float32
    assert Transcoder(config(activation, dtype="bfloat16")).activation.threshold.dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("name", ["float33", "int8", "nn", ""])
def test_a_name_that_is_no_floating_point_dtype_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' is not a floating-point"):
        torch_dtype(name)


def test_dtype_names_with_and_without_the_torch_prefix():
    assert torch_dtype("torch.bfloat16") is torch_dtype("bfloat16") is torch.bfloat16


# -- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", OPTIONS)
def test_a_config_survives_json(activation):
    before = config(
        activation,
        layer=3,
        input_site="N0",
        output_site="O'",
        skip=True,
        cross_layer=True,
        leading_positions=2,
        base_model="someone/model",
        dtype="bfloat16",
        source_format="foreign",
        extra={"foreign key": [1, {"a": None}]},
    )
    assert TranscoderConfig.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_to_dict_gives_a_copy():
    before = config(extra={"a": [1]})
    before.to_dict()["extra"]["a"].append(2)
    assert before.extra == {"a": [1]}


def test_an_unknown_key_is_named_and_the_known_ones_are_listed():
    with pytest.raises(ConfigError, match="d_sae") as caught:
        TranscoderConfig.from_dict(config().to_dict() | {"d_sae": 3})
    assert "d_transcoder" in str(caught.value)


@pytest.mark.parametrize("key", ["d_in", "d_out", "d_transcoder"])
def test_a_missing_key_is_named(key):
    data = config().to_dict()
    del data[key]
    with pytest.raises(ConfigError, match=key):
        TranscoderConfig.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_in": 0}, ["d_in", "0"]),
        ({"d_out": -1}, ["d_out", "-1"]),
        ({"d_transcoder": 2.0}, ["d_transcoder", "2.0"]),
        ({"d_in": "6"}, ["d_in", "'6'"]),
        ({"layer": -1}, ["layer", "-1"]),
        ({"leading_positions": -2}, ["leading_positions", "-2"]),
        ({"input_site": "X"}, ["input_site", "'X'", "N0"]),
        ({"input_site": "O'", "output_site": "O"}, ["input_site", "autoencoder", "'O'"]),
        ({"output_site": "N1"}, ["output_site", "'N1'", "O'"]),
        ({"activation": "tanh"}, ["tanh"]),
        ({"activation": "topk"}, ["k="]),
        ({"dtype": "int64"}, ["int64"]),
    ],
)
def test_a_value_out_of_range_is_named(changes, named):
    with pytest.raises(ConfigError) as caught:
        Transcoder(TranscoderConfig(**(config().to_dict() | changes)))
    for text in named:
        assert text in str(caught.value)


def test_replace_checks_the_new_values_and_leaves_the_old_config():
    before = config()
    assert before.replace(layer=4).layer == 4
    assert before.layer == 0
    with pytest.raises(ConfigError, match="layer"):
        before.replace(layer=-1)


# -- inputs that cannot be used ------------------------------------------------------------------


def test_an_input_of_the_wrong_width_names_the_layer_and_both_widths():
    with pytest.raises(InputError, match=rf"layer 3's .* {D_IN}, got 9"):
        make(layer=3)(inputs(2, width=9))


def test_a_skip_path_cannot_be_decoded_without_the_input():
    module = make(skip=True, layer=2)
    with pytest.raises(InputError, match="layer 2's .* skip path"):
        module.decode(torch.zeros(1, WIDTH))


def test_repr_tells_what_it_is():
    text = repr(make("topk", skip=True, layer=2, dtype="bfloat16"))
    for part in ("layer=2", f"d_in={D_IN}", "topk", "N1->O", "skip", "bfloat16", "k=3"):
        assert part in text


# -- cross-layer ---------------------------------------------------------------------------------

LAYERS = (1, 2, 4)  # a gap: targets are the set's own layers


def cross_layer(activation: str = "relu", *, skip: bool = False, **changes: Any) -> Any:
    """A random cross-layer transcoder over ``LAYERS``."""
    return CrossLayerTranscoder(
        {
            layer: randomise(
                CrossLayerPart(
                    config(activation, layer=layer, skip=skip, **changes),
                    tuple(t for t in LAYERS if t >= layer),
                ),
                seed=layer,
            )
            for layer in LAYERS
        }
    )


@pytest.mark.parametrize("sparse", [True, False, None])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", OPTIONS)
def test_a_cross_layer_transcoder_is_the_double_sum(activation, skip, sparse):
    clt = cross_layer(activation, skip=skip)
    xs = {layer: inputs(2, 3) * layer for layer in LAYERS}
    acts = {layer: clt.encode(xs[layer], layer) for layer in LAYERS}
    for target in LAYERS:
        own = clt.part(target)
        expected = own.b_dec.detach().clone().expand(2, 3, D_OUT)
        if skip:
            expected = expected + torch.einsum("bpd,od->bpo", xs[target], own.W_skip)
        for source in LAYERS:
            if source > target:
                continue
            part = clt.part(source)
            z = torch.einsum("bpd,fd->bpf", xs[source], part.W_enc) + part.b_enc
            column = [t for t in LAYERS if t >= source].index(target)
            for feature in range(WIDTH):
                a = part.activation(z)[..., feature, None]
                expected = expected + a * part.W_dec[feature, column]
        found = clt.decode(acts, target, xs[target], sparse=sparse)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_forward_gives_the_reconstruction_of_every_layer():
    clt = cross_layer("topk", skip=True)
    xs = {layer: inputs(2, 3, dtype=torch.bfloat16) for layer in LAYERS}
    acts = {layer: clt.encode(xs[layer], layer) for layer in LAYERS}
    found = clt(xs)
    assert set(found) == set(LAYERS)
    for layer in LAYERS:
        assert found[layer].dtype == torch.bfloat16
        expected = clt.decode(acts, layer, xs[layer]).to(torch.bfloat16)
        assert torch.equal(found[layer], expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_sparse_and_dense_contributions_and_their_gradients_agree(shape):
    part = cross_layer("topk").part(1)
    acts = part.encode(inputs(*shape)).detach()
    for target in part.targets:
        results = []
        for sparse in (True, False):
            leaf = acts.clone().requires_grad_()
            part.zero_grad()
            out = part.contribution(leaf, target, sparse=sparse)
            (out * inputs(*shape, width=D_OUT)).sum().backward()
            results.append((out.detach(), leaf.grad, part.W_dec.grad.clone()))
        for one, other in zip(*results, strict=True):
            assert one.any()
            torch.testing.assert_close(one, other)


def test_a_target_that_is_not_written_to_is_refused():
    part = cross_layer().part(2)
    with pytest.raises(InputError, match=r"layer 2's .* \(2, 4\), not to 1"):
        part.contribution(torch.zeros(1, WIDTH), 1)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"\(1, 2, 4\), not 3"):
        cross_layer().encode(inputs(1), 3)


@pytest.mark.parametrize("targets", [(), (2, 3), (0, 1), (1, 3, 2), (1, 2, 2)])
def test_a_part_must_write_to_its_own_layer_and_then_to_later_ones(targets):
    with pytest.raises(ConfigError, match="layer 1"):
        CrossLayerPart(config(layer=1), targets)


def test_parts_must_write_to_every_later_layer_of_the_transcoder():
    parts = {1: CrossLayerPart(config(layer=1), (1,)), 2: CrossLayerPart(config(layer=2), (2,))}
    with pytest.raises(ConfigError, match=r"\(1,\), expected \(1, 2\)"):
        CrossLayerTranscoder(parts)


def test_a_part_knows_that_it_is_cross_layer():
    assert cross_layer().part(1).config.cross_layer
    assert not make().config.cross_layer

"""Each activation against a definition written out in loops, value by value."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnsight_transcoders.activations import (
    ACTIVATIONS,
    BatchTopK,
    GroupTopK,
    JumpReLU,
    ReLU,
    TopK,
    make_activation,
)
from nnsight_transcoders.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 12


def values(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 3, WIDTH)) -> Tensor:
    """Distinct numbers of both signs, exact in every dtype used here."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return ((order - count // 2 + 0.5) / 8).reshape(shape).to(dtype)


def by_row(z: Tensor, rule: Callable[[list[float]], list[float]]) -> Tensor:
    """Apply a rule on plain numbers to every position."""
    rows = [rule(row) for row in z.double().reshape(-1, z.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(z.shape).to(z.dtype)


def keep_top(row: list[float], k: int, relu_first: bool) -> list[float]:
    """The k largest of a row; of equal ones any, so only for rows without ties."""
    if relu_first:
        row = [max(value, 0.0) for value in row]
    kept = sorted(range(len(row)), key=lambda i: row[i], reverse=True)[:k]
    return [value if i in kept else 0.0 for i, value in enumerate(row)]


# -- the definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu(dtype):
    z = values(dtype)
    found = ReLU()(z)
    assert found.dtype == dtype
    assert torch.equal(found, by_row(z, lambda row: [max(value, 0.0) for value in row]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_jumprelu_passes_values_above_the_threshold_unchanged(dtype):
    z = values(dtype)
    thresholds = [0.25 * i - 1 for i in range(WIDTH)]  # negative ones too: then negatives pass
    found = JumpReLU(torch.tensor(thresholds, dtype=dtype))(z)
    expected = by_row(
        z, lambda row: [v if v > t else 0.0 for v, t in zip(row, thresholds, strict=True)]
    )
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert (found < 0).any()


def test_jumprelu_is_zero_exactly_at_the_threshold():
    activation = JumpReLU(torch.tensor([0.5, 0.5, 0.5]))
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert activation(torch.tensor([0.5, above, 0.25])).tolist() == [0.0, above, 0.0]


@pytest.mark.parametrize("kind", [JumpReLU, BatchTopK])
def test_a_pre_activation_that_overflowed_half_precision_gives_zero_and_not_nan(kind):
    z = torch.tensor([-70000.0, 2.0]).half()
    assert kind(torch.tensor(1.0).half())(z).tolist() == [0.0, 2.0]


def test_jumprelu_with_one_threshold_for_all_features():
    z = values()
    found = JumpReLU(torch.tensor(1.0))(z)
    assert torch.equal(found, by_row(z, lambda row: [v if v > 1 else 0.0 for v in row]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu_first", [True, False])
@pytest.mark.parametrize("k", [1, 4, WIDTH])
def test_topk(dtype, relu_first, k):
    z = values(dtype)
    found = TopK(k, relu_first)(z)
    assert found.dtype == dtype
    assert torch.equal(found, by_row(z, lambda row: keep_top(row, k, relu_first)))


def test_topk_without_relu_keeps_negative_values_and_with_it_does_not():
    z = torch.tensor([-3.0, -1.0, -2.0, 4.0])
    assert TopK(3, relu_first=False)(z).tolist() == [0.0, -1.0, -2.0, 4.0]
    assert TopK(3, relu_first=True)(z).tolist() == [0.0, 0.0, 0.0, 4.0]


def test_topk_of_the_whole_width_is_the_identity_or_a_relu():
    z = values()
    assert torch.equal(TopK(WIDTH, relu_first=False)(z), z)
    assert torch.equal(TopK(WIDTH)(z), z.clamp_min(0))


def test_topk_keeps_exactly_k_of_tied_values():
    z = torch.tensor([[2.0, 2.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    found = TopK(2)(z)
    assert (found != 0).sum(-1).tolist() == [2, 2]
    assert found[0, 3] == 5
    assert found.sum(-1).tolist() == [7, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batchtopk_is_a_relu_and_then_one_threshold(dtype):
    z = values(dtype)
    found = BatchTopK(torch.tensor(0.75, dtype=dtype))(z)
    assert found.dtype == dtype
    assert torch.equal(found, by_row(z, lambda row: [v if v > 0.75 else 0.0 for v in row]))


def test_batchtopk_with_a_negative_threshold_lets_no_negative_value_pass():
    assert BatchTopK(torch.tensor(-1.0))(torch.tensor([-0.5, 0.5])).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("relu_first", [True, False])
@pytest.mark.parametrize(("k", "n_groups"), [(1, 3), (2, 4), (4, 3), (2, 1), (1, WIDTH)])
def test_grouptopk_chooses_within_each_contiguous_group(relu_first, k, n_groups):
    z = values()
    size = WIDTH // n_groups

    def rule(row: list[float]) -> list[float]:
        groups = [row[start : start + size] for start in range(0, WIDTH, size)]
        return [value for group in groups for value in keep_top(group, k, relu_first)]

    found = GroupTopK(k, n_groups, relu_first)(z)
    assert torch.equal(found, by_row(z, rule))


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (1, 1, 2, WIDTH)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_number_of_leading_dimensions(name, shape):
    activation = make_activation(name, d_transcoder=WIDTH, k=2, n_groups=3)
    z = values(shape=shape) if math.prod(shape) else torch.zeros(shape)
    found = activation(z)
    assert found.shape == z.shape
    rows = z.reshape(-1, WIDTH)
    one_by_one = [activation(row) for row in rows]
    if one_by_one:
        assert torch.equal(found.reshape(-1, WIDTH), torch.stack(one_by_one))


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_pass_where_the_activation_does_and_nowhere_else(name):
    threshold = torch.full((WIDTH,), 0.75) if name == "jumprelu" else torch.tensor(0.75)
    activation = make_activation(
        name,
        d_transcoder=WIDTH,
        k=2,
        n_groups=3,
        threshold=threshold if name in ("jumprelu", "batchtopk") else None,
    )
    z = values().requires_grad_()
    found = activation(z)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    (found * upstream).sum().backward()
    assert 0 < int((found != 0).sum()) < found.numel()
    assert torch.equal(z.grad, torch.where(found != 0, upstream, 0.0))


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "gelu"}, ["'gelu'", *ACTIVATIONS]),
        ({"name": "topk"}, ["'topk'", "k="]),
        ({"name": "topk", "k": 0}, ["k=0", str(WIDTH)]),
        ({"name": "topk", "k": -1}, ["k=-1"]),
        ({"name": "topk", "k": WIDTH + 1}, [f"k={WIDTH + 1}", f"<= {WIDTH}"]),
        ({"name": "topk", "k": 2.5}, ["k=2.5", "integer"]),
        ({"name": "grouptopk", "k": 2}, ["n_groups", "None"]),
        ({"name": "grouptopk", "k": 2, "n_groups": 3.0}, ["n_groups", "3.0"]),
        ({"name": "grouptopk", "k": 2, "n_groups": 5}, ["n_groups", "5", str(WIDTH)]),
        ({"name": "grouptopk", "k": 2, "n_groups": -3}, ["n_groups", "-3"]),
        ({"name": "grouptopk", "n_groups": 3}, ["k="]),
        ({"name": "grouptopk", "k": 5, "n_groups": 3}, ["k=5", "<= 4"]),
        ({"name": "jumprelu", "threshold": torch.zeros(3)}, ["threshold", "(3,)", f"({WIDTH},)"]),
        ({"name": "batchtopk", "threshold": torch.zeros(1, WIDTH)}, ["threshold", f"(1, {WIDTH})"]),
    ],
)
def test_bad_parameters_are_named(options, named):
    with pytest.raises(ConfigError) as caught:
        make_activation(d_transcoder=WIDTH, **options)
    for text in named:
        assert text in str(caught.value)


def test_make_activation_passes_its_parameters_on():
    topk = make_activation("topk", d_transcoder=WIDTH, k=3, relu_first=False)
    assert isinstance(topk, TopK)
    assert (topk.k, topk.relu_first) == (3, False)
    grouped = make_activation("grouptopk", d_transcoder=WIDTH, k=2, n_groups=4)
    assert isinstance(grouped, GroupTopK)
    assert (grouped.n_groups, grouped.topk.k, grouped.topk.relu_first) == (4, 2, True)
    assert type(make_activation("relu", d_transcoder=WIDTH)) is ReLU
    threshold = torch.arange(float(WIDTH))
    assert torch.equal(
        make_activation("jumprelu", d_transcoder=WIDTH, threshold=threshold).threshold, threshold
    )


@pytest.mark.parametrize(("name", "shape"), [("jumprelu", (WIDTH,)), ("batchtopk", ())])
def test_a_threshold_that_is_not_given_is_zero_and_of_the_usual_shape(name, shape):
    threshold = make_activation(name, d_transcoder=WIDTH).threshold
    assert threshold.shape == shape
    assert not threshold.any()


def test_repr_shows_the_parameters():
    assert "k=3, relu_first=False" in repr(TopK(3, False))
    assert "n_groups=4" in repr(GroupTopK(2, 4))

"""Every statistic against plain Python on tiny data, in any cut into batches."""

from __future__ import annotations

import pytest
import torch

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.features.entries import SparseActivations
from nnsight_transcoders.features.statistics import (
    NEVER,
    FeatureStatistics,
    StatisticsConfig,
)
from nnsight_transcoders.features.tables import BestTable, mixed
from nnsight_transcoders.features.windows import window_counts

from .support import (
    N_FEATURES,
    SMALL,
    Brute,
    as_batch,
    collected,
    ids_of,
    random_contexts,
    windows_of,
)

CONTEXTS = random_contexts()
ALIVE = range(N_FEATURES - 1)


@pytest.fixture(scope="module", params=[1, 7, 40])
def statistics(request: pytest.FixtureRequest) -> FeatureStatistics:
    return collected(CONTEXTS, request.param)


def top_of(statistics: FeatureStatistics, feature: int) -> list[tuple[float, int]]:
    keys = [key for key in statistics.top.keys[feature].tolist() if key >= 0]
    values = torch.tensor([key >> 32 for key in keys], dtype=torch.int32).view(torch.float32)
    places = [2**32 - 1 - (key & (2**32 - 1)) for key in keys]
    return list(zip(values.tolist(), places, strict=True))


def test_counts_sums_and_maxima(statistics: FeatureStatistics) -> None:
    assert statistics.n_tokens == statistics.n_positions == sum(map(len, CONTEXTS))
    for feature in ALIVE:
        brute = Brute(CONTEXTS, feature)
        assert int(statistics.count[feature]) == len(brute.values)
        assert float(statistics.total[feature]) == pytest.approx(sum(brute.values), rel=1e-12)
        assert float(statistics.maximum[feature]) == max(brute.values)


def test_histograms(statistics: FeatureStatistics) -> None:
    for feature in ALIVE:
        brute = Brute(CONTEXTS, feature)
        assert 2.0 ** int(statistics.exponent[feature]) == brute.range
        assert statistics.histogram[feature].tolist() == brute.histogram(SMALL.n_bins)


def test_the_largest_contexts_with_their_windows(statistics: FeatureStatistics) -> None:
    for feature in ALIVE:
        brute = Brute(CONTEXTS, feature)
        found = top_of(statistics, feature)
        assert found == brute.top(SMALL.n_top, SMALL.before, SMALL.after)
        for slot, (value, place) in enumerate(found):
            window = statistics.top.payload["window"][feature, slot].double() * value
            expected = brute.window(place, SMALL.before, SMALL.after)
            assert window.tolist() == pytest.approx(expected, rel=1e-3)


def test_windows_of_the_same_tokens_are_counted(statistics: FeatureStatistics) -> None:
    windows = windows_of(CONTEXTS, SMALL.before, SMALL.after)
    ids = torch.cat([ids_of(context) for context in CONTEXTS])
    starts = torch.tensor([0, *map(len, CONTEXTS)]).cumsum(0)
    digests = statistics.top.payload["digest"]
    counts = window_counts(ids, starts, digests, SMALL.before, SMALL.window)
    for feature in ALIVE:
        for slot, (_, place) in enumerate(top_of(statistics, feature)):
            assert int(counts[feature, slot]) == windows.count(windows[place])
    assert counts.max() > 1


def test_bands_are_samples_of_their_contexts(statistics: FeatureStatistics) -> None:
    n_bands = SMALL.n_bands
    for feature in ALIVE:
        brute = Brute(CONTEXTS, feature)
        for band, expected in enumerate(brute.bands(n_bands, SMALL.per_band)):
            row = feature * n_bands + band
            used = statistics.bands.keys[row] >= 0
            values = statistics.bands.payload["value"][row][used].tolist()
            places = statistics.bands.payload["peak"][row][used].tolist()
            assert set(zip(values, places, strict=True)) == expected
            for slot, (value, place) in enumerate(zip(values, places, strict=True)):
                window = statistics.bands.payload["window"][row, slot].double() * value
                wanted = brute.window(place, SMALL.before, SMALL.after)
                assert window.tolist() == pytest.approx(wanted, rel=1e-3)


def test_sketches_are_samples_of_the_active_positions(statistics: FeatureStatistics) -> None:
    for feature in ALIVE:
        keys = mixed(torch.tensor(Brute(CONTEXTS, feature).places)).tolist()
        kept = [key for key in statistics.sketch.keys[feature].tolist() if key >= 0]
        assert sorted(kept) == sorted(keys, reverse=True)[: SMALL.sketch][::-1]


def test_reference_windows_know_what_is_active_in_them(statistics: FeatureStatistics) -> None:
    starts = torch.tensor([0, *map(len, CONTEXTS)]).cumsum(0)
    keys = mixed(mixed(starts[:-1]) ^ -1)
    order = keys.argsort(descending=True)[: SMALL.n_reference].tolist()
    dense = torch.cat(CONTEXTS)
    windows = zip(
        order,
        statistics.reference.start.tolist(),
        statistics.reference.length.tolist(),
        strict=True,
    )
    for column, (context, start, length) in enumerate(windows):
        assert starts[context] <= start
        assert start + length <= starts[context + 1]
        assert length == min(SMALL.window, len(CONTEXTS[context]))
        active = (dense[start : start + length] > 0).any(0)
        assert statistics.reference.active[:, column].tolist() == active.tolist()


def test_a_feature_that_is_never_active(statistics: FeatureStatistics) -> None:
    dead = N_FEATURES - 1
    assert int(statistics.count[dead]) == 0
    assert int(statistics.exponent[dead]) == NEVER
    assert not statistics.histogram[dead].any()
    assert (statistics.top.keys[dead] < 0).all()


def test_nothing_depends_on_how_the_stream_is_cut() -> None:
    one, other = collected(CONTEXTS, 3).tensors(), collected(CONTEXTS, 11).tensors()
    for name in one:
        if name == "total":
            assert torch.allclose(one[name], other[name], rtol=1e-13)
        elif not name.startswith("sketch"):  # slots in no order
            assert torch.equal(one[name], other[name]), name


def test_a_state_goes_on_where_it_stopped() -> None:
    whole, half = FeatureStatistics(N_FEATURES, SMALL), FeatureStatistics(N_FEATURES, SMALL)
    batches = [as_batch(CONTEXTS[i : i + 5]) for i in range(0, len(CONTEXTS), 5)]
    for batch in batches:
        whole.add(*batch)
    for batch in batches[:3]:
        half.add(*batch)
    resumed = FeatureStatistics(N_FEATURES, SMALL)
    resumed.load({name: tensor.clone() for name, tensor in half.tensors().items()})
    for batch in batches[3:]:
        resumed.add(*batch)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_memory_does_not_grow_with_the_corpus() -> None:
    statistics = FeatureStatistics(N_FEATURES, SMALL)

    def size() -> int:
        return sum(tensor.numel() for tensor in statistics.tensors().values())

    before = size()
    for first in range(0, len(CONTEXTS), 4):
        statistics.add(*as_batch(CONTEXTS[first : first + 4]))
    assert size() == before


def test_positions_that_were_not_measured_are_not_counted() -> None:
    statistics = FeatureStatistics(N_FEATURES, SMALL)
    statistics.add([torch.zeros(1), torch.zeros(4)], as_batch([])[1], n_positions=2)
    assert (statistics.n_tokens, statistics.n_positions) == (5, 2)


def test_negative_activations_are_left_out_and_nan_is_refused() -> None:
    columns = [torch.tensor([0, 0])] * 3
    statistics = FeatureStatistics(N_FEATURES, SMALL)
    value = torch.tensor([-1.0, 2.0])
    at = (columns[0], torch.tensor([0, 1]), torch.tensor([3, 4]))
    statistics.add([torch.tensor([5, 6])], SparseActivations(*at, value))
    assert statistics.count.nonzero().flatten().tolist() == [4]
    with pytest.raises(InputError, match="NaN or infinite"):
        statistics.add([torch.tensor([5, 6])], SparseActivations(*at, value * float("nan")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_bands": 6}, "power of two"),
        ({"n_bins": 1}, "power of two"),
        ({"n_top": 0}, "n_top"),
        ({"before": -1}, "before"),
        ({"sketch": 0}, "sketch"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StatisticsConfig(**changes)


def test_a_table_keeps_the_largest_keys_of_each_row() -> None:
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(6, (500,), generator=draw)
    key = torch.randperm(500, generator=draw)
    table = BestTable(7, 4, {"twice": (torch.int64, ())})
    for first in range(0, 500, 33):
        part = slice(first, first + 33)
        table.offer(row[part], key[part], {"twice": 2 * key[part]})
    table.sort()
    for r in range(6):
        best = sorted(key[row == r].tolist(), reverse=True)[:4]
        assert table.keys[r].tolist() == best
        assert table.payload["twice"][r].tolist() == [2 * k for k in best]
    assert (table.keys[6] == -1).all()


def test_a_table_of_distinct_entries_keeps_the_largest_of_equal_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(3, (400,), generator=draw)
    key = torch.randperm(400, generator=draw)
    same = torch.randint(9, (400,), generator=draw)
    for size in (1, 33, 400):
        table = BestTable(4, 5, {"same": (torch.int64, ())}, distinct="same")
        for part in (slice(first, first + size) for first in range(0, 400, size)):
            table.offer(row[part], key[part], {"same": same[part]})
        table.sort()
        for r in range(3):
            largest = {s: int(key[(row == r) & (same == s)].max()) for s in range(9)}
            best = sorted(largest.items(), key=lambda item: -item[1])[:5]
            assert table.keys[r].tolist() == [k for _, k in best]
            assert table.payload["same"][r].tolist() == [s for s, _ in best]
        assert (table.keys[3] == -1).all()


def test_the_hash_mixes() -> None:
    hashed = mixed(torch.arange(20_000))
    assert len(hashed.unique()) == 20_000
    assert int(hashed.min()) >= 0
    bits = (hashed[:, None] >> torch.arange(63)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.02
    # Published values of SplitMix64, seed 0: its first outputs, without the sign bit.
    assert int(mixed(torch.tensor(0))) == 0xE220A8397B1DCDAF & (2**63 - 1)

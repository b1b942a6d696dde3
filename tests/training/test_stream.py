"""Activations are those of the sites and positions asked for, in every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
import zoo
from torch import Tensor

from nnsight_transcoders import resolve_sites
from nnsight_transcoders.errors import CheckpointError, InputError, MismatchError
from nnsight_transcoders.evaluation.site_values import read_sites
from nnsight_transcoders.training.buffer import (
    ActivationBuffer,
    ActivationCache,
    Share,
    TokenBatches,
)
from nnsight_transcoders.training.data import Rows
from nnsight_transcoders.training.stream import SiteReader

IDS = torch.arange(3, 27).view(3, 8)
EVERYWHERE = torch.ones(3, 8, dtype=torch.bool)


def read(
    model: Any,
    layers: list[int],
    input_site: Any,
    output_site: Any,
    ids: Tensor = IDS,
    kept: Tensor = EVERYWHERE,
) -> dict[int, tuple[Tensor, Tensor]]:
    """The values of one batch."""
    reader = SiteReader(model, resolve_sites(model), layers, input_site, output_site)
    (found,) = reader([(ids, kept)])
    return found


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_the_values_at_every_site(name: str) -> None:
    """Against ``site_values``, which reads all sites in a trace of the whole model."""
    model = zoo.nnsight_model(name)
    sites = resolve_sites(model)
    expected = read_sites(model, sites, dict.fromkeys(range(3), 0), [IDS])
    for read_at, written_at in (("R", "O"), ("N1", "O'"), ("N0", "O"), ("O", "O"), ("O'", "O'")):
        if read_at == "N0" and sites.layers[0].mlp_norm is None:
            continue
        got = read(model, [2, 0], read_at, written_at)  # type: ignore[arg-type]
        assert list(got) == [0, 2]
        for layer, (x, y) in got.items():
            known = {**expected[layer].inputs, **expected[layer].outputs}
            torch.testing.assert_close(x, known[read_at], msg=f"{name} {layer} {read_at}")
            torch.testing.assert_close(y, known[written_at], msg=f"{name} {layer} {written_at}")
            assert (x is y) == (read_at == written_at)


def test_input_and_output_are_those_of_one_forward_of_the_mlp() -> None:
    """Error 7 of the paper's code: its evaluation reads and overwrites the input for the output."""
    model = zoo.nnsight_model("llama")
    got = read(model, [1], "N1", "O")
    x, y = got[1]
    torch.testing.assert_close(model._module.model.layers[1].mlp(x), y)
    assert not torch.allclose(x, y)


def test_the_model_stops_after_the_last_layer_that_is_needed() -> None:
    model = zoo.nnsight_model("llama")
    ran: list[int] = []
    for layer, block in enumerate(model._module.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    read(model, [0, 1], "N1", "O")
    assert ran == [0, 1]


def test_values_do_not_depend_on_padding_to_their_right() -> None:
    model = zoo.nnsight_model("llama")
    alone = read(model, [2], "N1", "O", IDS[:1, :5], EVERYWHERE[:1, :5])[2][1]
    kept = EVERYWHERE.clone()
    kept[0, 5:] = False
    long = IDS.clone()
    long[0, 5:] = 0
    torch.testing.assert_close(read(model, [2], "N1", "O", long, kept)[2][1][:5], alone)


def test_layers_that_do_not_exist() -> None:
    model = zoo.nnsight_model("llama")
    with pytest.raises(InputError, match="layers 0 to 2; there is no layer 3"):
        SiteReader(model, resolve_sites(model), [1, 3], "N1", "O")


# -- the buffer ----------------------------------------------------------------------------------


class Numbered:
    """A reader whose values say which token they are of."""

    def __call__(self, batches: Any) -> Any:
        for ids, kept in batches:
            x = ids[kept].float()[:, None].expand(-1, 2)
            yield {0: (x, x + 0.5)}


def buffer_of(data: Any, size: int = 12, batch: int = 4, cache: Any = None, **share: int) -> Any:
    rows = Rows(data, None, context=4, pack=True)
    batches = TokenBatches(rows, 2, 1, frozenset(), 0, Share(**share))
    return ActivationBuffer(
        batches,
        Numbered(),  # type: ignore[arg-type]
        size=size,
        batch_size=batch,
        seed=0,
        devices={0: torch.device("cpu")},
        dtype=torch.float32,
        cache=cache,
    )


DATA = [list(range(i, i + 8)) for i in range(0, 80, 8)]


def test_each_value_is_served_once_in_another_order() -> None:
    buffer = buffer_of(DATA)
    seen = [buffer.next_batch() for _ in range(3)]
    tokens = torch.cat([batch[0][0][:, 0] for batch in seen])
    expected = [t for t in range(16) if t % 4]  # position 0 of each row is left out
    assert sorted(tokens.tolist()) == expected
    assert tokens.tolist() != expected
    for batch in seen:
        torch.testing.assert_close(batch[0][1], batch[0][0] + 0.5)  # pairs stay together
    tokens = torch.cat([buffer.next_batch()[0][0][:, 0] for _ in range(3)])
    assert sorted(tokens.tolist()) == [t for t in range(16, 32) if t % 4]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 8])
def test_a_buffer_is_found_again(n: int) -> None:
    one, other = buffer_of(DATA), buffer_of(DATA)
    for _ in range(n):
        one.next_batch()
    other.restore(one.state())
    for _ in range(6):
        torch.testing.assert_close(other.next_batch()[0][0], one.next_batch()[0][0])


def test_what_is_left_at_the_end_of_the_data_is_served() -> None:
    buffer = buffer_of(iter(DATA[:3]), size=100)
    assert [buffer.next_batch() is None for _ in range(6)] == [False] * 4 + [True] * 2
    buffer = buffer_of(iter(DATA[:1]), size=100, batch=50)
    assert buffer.next_batch() is None


def test_processes_take_different_rows() -> None:
    values = []
    for rank in range(2):
        buffer = buffer_of(DATA[:4], rank=rank, world=2)
        values.append({float(v) for v in buffer.peek()[0][0][:, 0]})
    assert not values[0] & values[1]
    assert values[0] | values[1] == {float(t) for t in range(32) if t % 4}


def test_a_cache_serves_the_same_without_the_model(tmp_path: Path) -> None:
    first = buffer_of(DATA, cache=ActivationCache(tmp_path, "one"))
    expected = [first.next_batch()[0][1] for _ in range(8)]
    again = buffer_of(DATA, cache=ActivationCache(tmp_path, "one"))
    again._reader = None  # it would fail if it were called
    for values in expected:
        torch.testing.assert_close(again.next_batch()[0][1], values)
    with pytest.raises(MismatchError, match="not those that were read before"):
        buffer_of(DATA[::-1], cache=ActivationCache(tmp_path, "one")).next_batch()
    (tmp_path / "one/buffer_000000.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="buffer_000000.safetensors is damaged"):
        buffer_of(DATA, cache=ActivationCache(tmp_path, "one")).next_batch()


def test_a_model_without_a_tokenizer() -> None:
    model = nnsight.NNsight(zoo.hf_model("gpt2"))
    got = read(model, [0], "N1", "O")
    assert got[0][0].shape == (24, zoo.D_MODEL)

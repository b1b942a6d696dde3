"""A run that was packed for the way back is the run, to the last bit; norms are found by calls."""

from __future__ import annotations

import pytest
import torch
import zoo
from setups import IDS, model

from nnsight_transcoders.circuits.collect import Run, collect, eager_attention, run_parts
from nnsight_transcoders.norms import probed_spec
from nnsight_transcoders.remote.calls import call
from nnsight_transcoders.remote.edge_job import pack_rows, unpack_rows
from nnsight_transcoders.remote.packing import read_packed, unpack_run
from nnsight_transcoders.remote.payload import tensor_bytes
from nnsight_transcoders.remote.weights import norm_requests
from nnsight_transcoders.sites import resolve_sites

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read(name: str, dtype: torch.dtype, asked: str | None = None) -> tuple[Run, dict]:
    nn_model, ids = model(name, dtype), torch.tensor(IDS)
    module = nn_model._module
    sites = resolve_sites(module)
    with eager_attention(module), torch.no_grad():
        packed = call(
            nn_model,
            ids[None],
            read_packed,
            run_parts(sites),
            [len(ids) - 1],
            norm_requests(module, sites),
            asked,
            use_cache=False,
        )
    return collect(nn_model, sites, ids), packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_packing_loses_nothing(name, dtype):
    run, packed = read(name, DTYPES[dtype])
    for field, found in unpack_run(packed).items():
        expected = getattr(run, field)
        if isinstance(expected, list):
            assert all(map(torch.equal, found, expected)), field
        else:
            assert expected is None and found is None or torch.equal(found, expected), field
    size = sum(tensor_bytes(getattr(run, field)) for field in unpack_run(packed))
    norms = tensor_bytes(packed["norms"])
    assert tensor_bytes(packed) - norms < (0.85 if name in SANDWICH else 0.6) * size


#: Norms after attention and MLP: what they give follows from nothing else.
SANDWICH = {"gemma2", "gemma3", "olmo2"}


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_norms_found_by_calls_are_those_found_by_their_weights(name):
    _, packed = read(name, torch.float32)
    module = model(name)._module
    sites = resolve_sites(module)
    for asked, found in zip(norm_requests(module, sites), packed["norms"], strict=True):
        expected = probed_spec(module, asked["path"], sites.d_model)
        assert found["centred"] == expected.centred and found["eps"] == expected.eps
        torch.testing.assert_close(found["gain"], expected.gain, rtol=1e-5, atol=1e-6)
        if expected.bias is not None:
            bias = torch.zeros_like(expected.bias) if found["bias"] is None else found["bias"]
            torch.testing.assert_close(bias, expected.bias, rtol=1e-5, atol=1e-6)
        else:
            assert found["bias"] is None
        assert found["difference"] < 1e-5


def test_a_narrower_dtype_is_what_comes_back():
    _, packed = read("llama", torch.float32, "bfloat16")
    assert packed["layers"]["mlp_in"].dtype == packed["pattern"].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 7), (1, 8), (5, 0), (2, 17)])
def test_rows_without_their_zeros(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows[rows < 0.3] = 0
    packed = pack_rows(rows, None)
    assert torch.equal(unpack_rows(packed, rows.dtype), rows)
    assert len(packed["values"]) == int((rows != 0).sum())

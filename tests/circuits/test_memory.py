"""What long prompts need: rows kept once or not at all, patterns in blocks, one-pass influence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from setups import IDS, engine, model, relative, run, transcoders
from torch import Tensor

from nnsight_transcoders import AttributionGraph, TranscoderSet, attribute
from nnsight_transcoders.circuits import expand, folded, linear, operator_engine, prune
from nnsight_transcoders.circuits.active import active_features
from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.circuits.engine import OperatorEngine
from nnsight_transcoders.circuits.linear import ATTENDED, EMBEDDING
from nnsight_transcoders.circuits.targets import choose_targets
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import resolve_sites

KINDS = ("per-layer", "skip", "cross-layer")


def traced(name: str, kind: str, **options: Any) -> AttributionGraph:
    return attribute(model(name), transcoders(name, kind), IDS, **options)


def same(found: AttributionGraph, expected: AttributionGraph) -> None:
    assert torch.equal(found.index, expected.index)
    assert relative(found.adjacency(), expected.adjacency()) < 1e-5
    assert found.completeness_error < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_offloaded_rows_give_the_same_graph(kind: str, name: str, tmp_path: Path) -> None:
    expected = traced(name, kind, max_feature_nodes=30)
    opened = TranscoderSet.from_pretrained(transcoders(name, kind).save_pretrained(tmp_path))
    for offload in ("cpu", "disk"):
        found = attribute(model(name), opened, IDS, max_feature_nodes=30, offload=offload)
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.adjacency(), expected.adjacency())
        assert torch.equal(found.bias, expected.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_disk_are_not_held(kind: str) -> None:
    the_engine, held = engine("llama", kind)
    stored = active_features(
        run("llama")[1],
        transcoders("llama", kind),
        the_engine.inputs,
        the_engine.dtype,
        offload="disk",
    )
    for layer, features in stored.layers.items():
        assert not isinstance(features.encoder, Tensor)
        assert not isinstance(features.decoder, Tensor)
        some = torch.arange(0, len(features), 3)
        assert torch.equal(features.encoder_of(some), held.layers[layer].encoder_of(some))
        assert torch.equal(features.decoder_of(some), held.layers[layer].decoder_of(some))
        chosen = features.select(some)
        assert isinstance(chosen.decoder, Tensor)
        assert torch.equal(chosen.decoder[chosen.row], features.decoder_of(some))


def test_a_feature_that_is_active_twice_has_one_row() -> None:
    _, found = engine("llama", "per-layer")
    repeated = 0
    for layer, features in found.layers.items():
        weights = transcoders("llama", "per-layer")[layer].W_enc
        assert len(features.encoder) == len(features.index.unique()) == len(features.decoder)
        assert torch.equal(features.encoder[features.row], weights[features.index])
        repeated += len(features) - len(features.encoder)
    assert repeated > 0


@pytest.mark.parametrize("options", [{"offload": "gpu"}, {"offload": "disk", "remote": True}])
def test_offload_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="offload"):
        traced("llama", "per-layer", **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_causal_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = traced(name, "per-layer")
    monkeypatch.setattr(folded, "CAUSAL_BLOCK", 3)
    same(traced(name, "per-layer"), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_tokens_read_off_behind_the_first_attention_or_before_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, the_run = run(name)
    the_engine, _ = engine(name, "per-layer")
    embedding = the_run.embedding.to(the_engine.dtype)
    assert list(the_engine.token_sources(embedding, 0)) == [ATTENDED]
    expected = traced(name, "skip")
    monkeypatch.setattr(operator_engine, "SPREAD_BYTES", 0)
    assert list(the_engine.token_sources(embedding, 0)) == [EMBEDDING]
    same(traced(name, "skip"), expected)


def test_half_precision_patterns_and_weights_stay_as_they_are() -> None:
    nn_model = zoo.nnsight_model("llama", dtype=torch.bfloat16)
    sites, (_, reference) = resolve_sites(nn_model), run("llama")
    the_run = collect(nn_model, sites, reference.token_ids)
    chosen = transcoders("llama", "per-layer")
    frozen = OperatorEngine(nn_model._module, sites, the_run, chosen).frozen
    assert frozen.layers[0].attention.pattern.dtype == torch.bfloat16
    assert frozen.layers[0].attention.W_V.dtype == torch.bfloat16
    assert frozen.dtype == torch.float32
    targets = linear.Targets(
        torch.randn(3, zoo.D_MODEL), torch.tensor([2, 1, 1]), torch.tensor([6, 3, 5])
    )
    wide = [
        linear.FrozenLayer(
            linear.FrozenAttention(
                layer.attention.pattern.float(),
                layer.attention.W_V.float(),
                layer.attention.b_V,
                layer.attention.W_O.float(),
                layer.attention.b_O,
            ),
            layer.attention_norm,
            layer.attention_post_norm,
            layer.read,
            layer.write,
            layer.skip,
        )
        for layer in frozen.layers
    ]
    expected = linear.FrozenModel(tuple(wide), frozen.final_norm, frozen.parallel)
    for (site, g), (_, wanted) in zip(frozen.sweep(targets), expected.sweep(targets), strict=True):
        assert torch.equal(g, wanted), site


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("at_a_time", [1, expand.SHARES_AT_A_TIME])
def test_influence_in_one_pass(kind: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expand, "SHARES_AT_A_TIME", at_a_time)
    monkeypatch.setattr(prune, "EDGES_AT_A_TIME", 1000)
    sites, the_run = run("llama")
    the_engine, active = engine("llama", kind)
    nn_model = model("llama")
    final = the_engine.final[-1]
    chosen = choose_targets(nn_model, nn_model._module, sites, the_run, final, None, 10, 0.95)
    candidates = Candidates.build(the_run, active, chosen, len(IDS) - 1, the_engine)
    rows, expanded = expand.expand(candidates, the_engine, 10**6, 2**29, verbose=False)
    shuffled = torch.randperm(len(expanded), generator=torch.Generator().manual_seed(0))
    n_targets = len(chosen.names)
    rows = torch.cat([rows[:n_targets], rows[n_targets:][shuffled]])
    found = expand._influence(candidates, rows, expanded[shuffled])
    expected = traced("llama", kind).influence()[: len(found)]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)

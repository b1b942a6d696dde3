"""The nine errors of the paper's code: each way of computing fails here, and ours passes.

The paper is Dunefsky, Chlenski, Nanda 2024 (arXiv 2406.11944 v2), the code its repository
``transcoder_circuits``. Every test computes a quantity their way and ours, and holds both against
what is true of the run. docs/from_the_paper.md lists them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from setups import IDS, model, run, transcoders
from torch import Tensor
from zoo import hf_model

from nnsight_transcoders import attached, verify
from nnsight_transcoders.circuits.contributions import CircuitRun, Contribution, FeatureVector
from nnsight_transcoders.circuits.freeze import freeze_norms
from nnsight_transcoders.circuits.path_graph import path_graph
from nnsight_transcoders.circuits.paths import Path, Where, merge_paths, top_paths
from nnsight_transcoders.sites import resolve_sites

THEIR_KINDS = ("token", "position", "feature", "attention")


@cache
def circuit(name: str, kind: str = "per-layer") -> CircuitRun:
    return CircuitRun.collect(model(name), transcoders(name, kind), IDS)


def last_feature(on: CircuitRun, layer: int) -> tuple[FeatureVector, float]:
    """An active feature of a layer as the target, and its pre-activation."""
    active = on.active.layers[layer]
    target = on.feature(layer, int(active.index[-1]), int(active.position[-1]))
    return target, float(active.pre_activation[-1])


# -- 1: the accounting does not close -------------------------------------------------------------


def test_1_accounting_closes() -> None:
    """Theirs: the pruning error is what the kept children leave of the root; then the transcoder
    errors and the biases are drawn as further nodes, which the root already contained."""
    on = circuit("gpt2")
    target, pre_activation = last_feature(on, 2)
    found = on.contributions(target)
    children = sorted((c.value for c in found if c.kind in THEIR_KINDS), reverse=True)[:5]
    pruning_error = pre_activation - sum(children)
    others = sum(c.value for c in found if c.kind in ("error", "bias"))
    theirs = sum(children) + pruning_error + others
    assert abs(theirs - pre_activation) > 0.1 * abs(pre_activation)

    paths = top_paths(on, target, depth=3, per_node=5, beam=20)
    ours = merge_paths(on, target, paths)
    assert sum(e.value for e in ours.into(None)) == pytest.approx(pre_activation, rel=1e-4)
    assert path_graph(on, target, paths).completeness_error < 1e-4
    assert sum(c.value for c in found) == pytest.approx(pre_activation, rel=1e-4)


# -- 2: the norm ratio -----------------------------------------------------------------------------


def their_norm_ratio(vector: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Their stand-in for a norm: how much larger the product with it is after than before."""
    return (after @ vector) / (before @ vector)


def test_2_norms_by_their_adjoint() -> None:
    """On an ordinary Hugging Face model: gains are not folded, the stream is not centred."""
    sites, the_run = run("gpt2", torch.float64)
    module, path = model("gpt2", torch.float64)._module, sites.layers[1].mlp_norm
    assert path is not None
    norm, layer_norm = freeze_norms(module, sites, the_run)[path], module.get_submodule(path)
    stream, gain, at = the_run.mid[1][4], layer_norm.weight.detach(), torch.tensor([4])
    after = layer_norm(stream).detach()
    sigma = (stream.var(unbiased=False) + layer_norm.eps).sqrt()
    torch.manual_seed(0)
    wrong, right = [], []
    for vector in torch.randn(50, len(stream), dtype=torch.float64):
        source = torch.randn_like(vector)
        true = (gain * (source - source.mean()) / sigma) @ vector
        theirs = their_norm_ratio(vector, stream, after) * (source @ vector)
        ours = norm.adjoint_at(vector[None], at)[0] @ source
        wrong.append(abs(theirs - true) / abs(true))
        right.append(abs(ours - true) / abs(true))
    assert torch.stack(wrong).median() > 0.1
    assert torch.stack(right).max() < 1e-6


def test_2_the_norm_ratio_is_ours_where_it_is_exact() -> None:
    """Folded gains and a centred stream: the case that their code was written for."""
    torch.manual_seed(0)
    stream = torch.randn(16, dtype=torch.float64)
    stream = stream - stream.mean()
    after = stream / stream.std(unbiased=False)
    vector, source = torch.randn(2, 16, dtype=torch.float64)
    source = source - source.mean()
    theirs = their_norm_ratio(vector, stream, after) * (source @ vector)
    assert float(theirs) == pytest.approx(float(source @ vector / stream.std(unbiased=False)))


# -- 3: signed ranking -----------------------------------------------------------------------------


def signed_search(on: CircuitRun, target: FeatureVector, per_node: int, beam: int) -> list[Path]:
    """Their search: at every step the largest signed contributions."""
    kept: list[Path] = []
    frontier: list[tuple[tuple[Contribution, ...], FeatureVector]] = [((), target)]
    for _ in range(2):
        found = []
        for steps, vector in frontier:
            best = sorted(on.contributions(vector), key=lambda c: -c.value)[:per_node]
            found += [((*steps, c), vector) for c in best]
        found = sorted(found, key=lambda one: -one[0][-1].value)[:beam]
        kept += [Path(target.name, steps) for steps, _ in found]
        frontier = [
            (steps, on.extend(vector, steps[-1]))
            for steps, vector in found
            if steps[-1].kind in ("feature", "attention")
        ]
    return kept


def test_3_inhibitory_paths_are_found() -> None:
    on = circuit("gpt2")
    target = on.token(5)
    every = top_paths(on, target, depth=2, per_node=10**6, beam=10**9)
    best = {path.steps for path in every[:20]}
    assert any(path.value < 0 for path in every[:20])

    def recall(paths: list[Path]) -> float:
        return len(best & {path.steps for path in paths}) / len(best)

    theirs = recall(signed_search(on, target, per_node=20, beam=60))
    ours = recall(top_paths(on, target, depth=2, per_node=20, beam=60))
    assert theirs < 0.8
    assert ours > theirs
    assert ours > 0.8


# -- 4: the cap ------------------------------------------------------------------------------------


def test_4_the_cap_is_the_smallest_contribution() -> None:
    on = circuit("gpt2")
    target = on.token(5)
    paths = top_paths(on, target, depth=3, per_node=40, beam=4000)
    two = [p for p in paths if sum(s.kind == "feature" for s in p.steps) >= 2]
    theirs = [[s for s in p.steps if s.kind == "feature"][-1].value for p in two]
    smallest = [min(abs(s.value) for s in p.steps if s.kind == "feature") for p in two]
    assert any(abs(t) > s * 1.01 for t, s in zip(theirs, smallest, strict=True))
    assert all(abs(p.capped) <= s + 1e-12 for p, s in zip(two, smallest, strict=True))
    assert all(p.capped * p.value >= 0 for p in paths)
    alone = Path("root", (Contribution("token", -1, 0, -1, -2.0),))
    assert alone.capped == -2.0


# -- 5: logit roots --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_5_logit_roots_pass_the_final_norm(name: str) -> None:
    on = circuit(name)
    logits = on.run.logits[-1]
    true = float(logits[5] - logits.mean())
    weight: Any = on.model._module.get_submodule(on.sites.unembed).weight.detach()
    theirs = float(on.run.final[-1] @ (weight[5] - weight.mean(0)))
    assert theirs != pytest.approx(true, rel=0.05)
    found = on.contributions(on.token(5))
    assert sum(c.value for c in found) == pytest.approx(true, rel=1e-3, abs=1e-4)


# -- 6: parallel blocks ----------------------------------------------------------------------------


def test_6_attention_beside_an_mlp_is_not_upstream_of_it() -> None:
    on = circuit("gpt-neox")
    target, pre_activation = last_feature(on, 1)
    # Theirs counts the attention of the feature's own layer, as in a sequential model.
    below = FeatureVector(target.vector, target.position, 2, 1, target.constant, target.name)
    theirs = sum(c.value for c in on.contributions(below))
    assert theirs != pytest.approx(pre_activation, rel=1e-2)
    found = on.contributions(target)
    assert max(c.layer for c in found if c.kind == "attention") == 0
    assert sum(c.value for c in found) == pytest.approx(pre_activation, rel=1e-3)
    sequential = circuit("gpt-neox-sequential")
    target, pre_activation = last_feature(sequential, 1)
    found = sequential.contributions(target)
    assert max(c.layer for c in found if c.kind == "attention") == 1
    assert sum(c.value for c in found) == pytest.approx(pre_activation, rel=1e-3)


# -- 7: evaluation ---------------------------------------------------------------------------------


def test_7_evaluation_replaces_the_output_and_explains_the_output() -> None:
    """Theirs puts the reconstruction into the hook that the transcoder reads, and measures its
    variance explained against what it reads. (Ghost gradients: nothing is trained here.)"""
    chosen, module = transcoders("gpt2", "per-layer"), hf_model("gpt2")
    ids, part = torch.tensor([IDS]), chosen[1]
    mlp: Any = module.get_submodule(resolve_sites(module).layers[1].mlp)
    seen: dict[str, Tensor] = {}
    handle = mlp.register_forward_hook(lambda _, x, y: seen.update(x=x[0][0], y=y[0]))
    with torch.no_grad():
        module(ids)
    handle.remove()
    with torch.no_grad():
        error = (seen["y"] - part(seen["x"])).pow(2).sum()

    def unexplained(target: Tensor) -> float:
        return float(error / (target - target.mean(0)).pow(2).sum())

    ours = verify(model("gpt2"), chosen.subset([1]), [IDS])
    assert ours.layers[0].fvu == pytest.approx(unexplained(seen["y"]), rel=1e-3)
    assert unexplained(seen["x"]) != pytest.approx(unexplained(seen["y"]), rel=0.1)

    with torch.no_grad():
        handle = mlp.register_forward_hook(lambda *args: part(args[1][0]))
        true = module(ids).logits
        handle.remove()
        handle = mlp.register_forward_pre_hook(lambda *args: (part(args[1][0]),))
        theirs = module(ids).logits
        handle.remove()
    with attached(model("gpt2"), chosen, [1]) as replaced:
        with replaced.trace(ids):
            logits = replaced.output.logits.save()
    assert torch.allclose(logits, true, atol=1e-4)
    assert not torch.allclose(theirs, true, atol=1e-2)


# -- 8 and 9: filters ------------------------------------------------------------------------------


def test_8_the_first_token_can_be_left_out() -> None:
    """Theirs compares token ids with the text of the token, so nothing is ever left out."""
    on = circuit("gpt2")
    found = on.contributions(on.token(5))
    ids = on.run.token_ids.tolist()
    theirs = [c for c in found if ids[c.position] != "<bos>"]
    assert theirs == found
    keep = Where(positions={i for i, text in enumerate(on.token_texts) if text != "<bos>"})
    assert any(c.position == 0 for c in found)
    assert all(c.position != 0 for c in found if keep(c))
    paths = top_paths(on, on.token(5), depth=2, where=keep)
    assert paths
    assert all(path.avoids(Where(positions={0})) for path in paths)


def test_9_filters_honour_more_than_equality() -> None:
    """Theirs asks for "layer not 0" or "layer up to 1" and gets "layer is 0", "layer is 1"."""
    on = circuit("gpt2")
    found = [c for c in on.contributions(on.token(5)) if c.kind == "feature"]

    def theirs(value: int) -> set[int]:
        return {c.layer for c in found if c.layer == value}

    def ours(where: Where) -> set[int]:
        return {c.layer for c in found if where(c)}

    assert ours(~Where(layers={0})) == {1, 2} != theirs(0)
    assert ours(Where(layers=range(2))) == {0, 1} != theirs(1)
    assert ours(Where(layers={0}) | Where(layers={2})) == {0, 2}
    numbers = {c.index for c in found}
    assert {c.index for c in found if Where(features=range(10))(c)} == {
        i for i in numbers if i < 10
    }

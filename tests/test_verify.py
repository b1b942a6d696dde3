"""``verify``: its numbers against plain hooks, sets that fit, and what it refuses."""

from __future__ import annotations

import shutil
from typing import Any

import nnsight
import pytest
import torch
import torch.nn.functional as F
import zoo
from verify_support import (
    LAYERS,
    TEXT,
    D,
    cross_layer,
    exact,
    relu_model,
)

from nnsight_transcoders import (
    Transcoder,
    TranscoderConfig,
    TranscoderSet,
    builtin_model_path,
    resolve_sites,
    verify,
)
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.errors import InputError, MismatchError


@pytest.fixture(scope="module")
def relu() -> Any:
    return relu_model()


# -- a set that fits -----------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_an_exact_set_passes(relu, skip):
    report = verify(relu, exact(relu, skip=skip), TEXT)
    assert report.ok
    assert report.n_tokens == sum(map(len, TEXT))
    assert report.ce_replaced == pytest.approx(report.ce, abs=1e-5)
    for fit in report.layers:
        assert fit.fvu < 1e-10
        assert fit.ce_change == pytest.approx(0, abs=1e-5)
        assert (fit.verdict, fit.hypothesis) == ("fits", None)


def test_without_a_text_there_is_a_default_one(relu):
    assert verify(relu, exact(relu)).n_tokens > 50


def test_the_builtin_model_gets_its_own_text_whatever_it_is_called(tmp_path):
    folder = shutil.copytree(builtin_model_path(), tmp_path / "renamed")
    copy = nnsight.TransformersModel(str(folder), task="text-generation", dispatch=True)
    report = verify(copy, TranscoderSet.from_pretrained("builtin/per-layer"))
    assert report.ok
    assert report.ce < 2.5  # of English it knows no word


def test_a_long_text_is_measured_piece_by_piece(relu):
    text = [i for row in TEXT for i in row] * 3
    report = verify(relu, exact(relu), [text])
    assert report.n_tokens == len(text) > relu._module.config.n_positions
    assert report.ok


# -- cross-layer ---------------------------------------------------------------------------------


def test_a_cross_layer_set(relu):
    report = verify(relu, cross_layer(relu), TEXT)
    assert report.ok
    assert max(fit.fvu for fit in report.layers) < 1e-10
    assert [fit.ce_change for fit in report.layers] == [None] * LAYERS
    assert report.ce_replaced == pytest.approx(report.ce, abs=1e-5)


# -- the numbers, once more with hooks -----------------------------------------------------------


@pytest.mark.parametrize("leading", [0, 1])
def test_the_numbers_are_those_of_plain_hooks(leading):
    model = zoo.nnsight_model("llama")
    run = collect(model, resolve_sites(model), torch.tensor(TEXT[-1]))
    chosen = random_transcoders(
        run, "skip", activation="topk", k=7, relu_first=False, leading_positions=leading
    )
    report = verify(model, chosen, TEXT)
    oracle = Hooked(model._module, chosen, leading)
    assert report.ce == pytest.approx(oracle.cross_entropy([]), rel=1e-5)
    assert report.ce_replaced == pytest.approx(oracle.cross_entropy([0, 1, 2]), rel=1e-5)
    assert report.n_tokens == sum(len(text) - leading for text in TEXT)
    for fit in report.layers:
        fvu, l0 = oracle.fit(fit.layer)
        assert fit.fvu == pytest.approx(fvu, rel=1e-4)
        assert fit.l0 == pytest.approx(l0)
        change = oracle.cross_entropy([fit.layer]) - report.ce
        assert fit.ce_change == pytest.approx(change, rel=1e-3, abs=1e-6)


class Hooked:
    """``verify`` by forward hooks on the Hugging Face module, one text at a time."""

    def __init__(self, module: Any, chosen: TranscoderSet, leading: int) -> None:
        self.module, self.chosen, self.leading = module, chosen, leading

    def cross_entropy(self, layers: list[int]) -> float:
        handles = []
        for layer in layers:

            def replace(_, args, output, layer=layer):
                made = self.chosen[layer](args[0])
                return torch.cat([output[:, : self.leading], made[:, self.leading :]], dim=1)

            mlp = self.module.model.layers[layer].mlp
            handles.append(mlp.register_forward_hook(replace))
        losses = []
        with torch.no_grad():
            for text in TEXT:
                logits = self.module(torch.tensor([text])).logits[0]
                losses.append(
                    F.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="none")
                )
        for handle in handles:
            handle.remove()
        return float(torch.cat(losses).mean())

    def fit(self, layer: int) -> tuple[float, float]:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        mlp = self.module.model.layers[layer].mlp
        handle = mlp.register_forward_hook(lambda _, args, out: seen.append((args[0][0], out[0])))
        with torch.no_grad():
            for text in TEXT:
                self.module(torch.tensor([text]))
        handle.remove()
        x = torch.cat([x[self.leading :] for x, _ in seen])
        y = torch.cat([y[self.leading :] for _, y in seen])
        module = self.chosen[layer]
        error = (y - module(x)).pow(2).sum()
        fvu = error / (y - y.mean(0)).pow(2).sum()
        return float(fvu), float((module.encode(x) != 0).sum(1).float().mean())


# -- refusals ------------------------------------------------------------------------------------


def test_texts_that_cannot_be_measured(relu):
    for text in ("", "w5", [[5]], [], ["w5", [7]]):
        with pytest.raises(InputError, match="no text of at least two tokens"):
            verify(relu, exact(relu), text)
    with pytest.raises(InputError, match="list of token ids, got int"):
        verify(relu, exact(relu), [5, 6, 7])
    with pytest.raises(InputError, match="does not vary"):
        verify(relu, exact(relu, leading_positions=1), [[5, 6]])


def test_a_set_of_another_shape(relu):
    config = TranscoderConfig(D // 2, D // 2, 8)
    with pytest.raises(MismatchError, match="d_model"):
        verify(relu, TranscoderSet.from_transcoders({0: Transcoder(config)}), TEXT)

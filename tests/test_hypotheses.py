"""What is wrong with a set that does not fit: each property broken in turn, and named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
import zoo
from typer.testing import CliRunner
from verify_support import (
    LAYERS,
    TEXT,
    D,
    as_if,
    built,
    causes,
    changed,
    cross_layer,
    exact,
    least_squares,
    norm,
    random_module,
    relu_model,
    site_values,
)

from nnsight_transcoders import (
    TranscoderSet,
    resolve_sites,
    verify,
)
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.cli import app
from nnsight_transcoders.evaluation.hypotheses import NONE_FITS, rank_hypotheses


@pytest.fixture(scope="module")
def relu() -> Any:
    return relu_model()


@pytest.fixture(scope="module")
def gemma() -> Any:
    """A Gemma 2, which has a norm after the MLP."""
    return built(transformers.Gemma2Config(**zoo._GEMMA))


# -- one thing wrong at a time -------------------------------------------------------------------


@pytest.mark.parametrize("site", ["R", "N0"])
def test_the_wrong_input_site(relu, site):
    found = causes(relu, exact(relu, input_site=site))
    assert found == {f"input site N1 instead of {site}"}


def test_a_bias_free_gain_folded_into_the_encoder(relu):
    def fold(module, layer):  # reads N0 in truth: gain and bias are in the encoder
        module.b_enc += module.W_enc @ norm(relu, layer).bias
        module.W_enc *= norm(relu, layer).weight

    assert causes(relu, changed(exact(relu), fold)) == {"input site N0 instead of N1"}


@pytest.mark.parametrize("power, verb", [(1, "divided"), (-1, "multiplied")])
def test_the_gain(relu, power, verb):
    def scale(module, layer):
        module.W_enc *= norm(relu, layer).weight ** power

    assert causes(relu, changed(exact(relu), scale)) == {f"input {verb} by the norm's gain"}


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "W_skip"])
def test_a_transposed_matrix(relu, name):
    def transpose(module, _):
        weight = module.get_parameter(name)
        weight.copy_(weight.T.clone())

    broken = changed(exact(relu, skip=name == "W_skip"), transpose)
    assert causes(relu, broken) == {f"{name} transposed"}


@pytest.mark.parametrize("sign, words", [(1, "b_dec"), (-1, "b_dec not")])
def test_input_centring(relu, sign, words):
    def centre(module, _):
        module.b_enc += sign * module.W_enc @ module.b_dec

    broken = changed(exact(relu), centre)
    assert causes(relu, broken) == {f"{words} subtracted from the input"}


def test_an_output_bias_that_does_not_belong_there():
    torch.manual_seed(0)
    x, noise = torch.randn(200, D), 10 * torch.randn(D)
    module = random_module()
    values = site_values(x, module(x))
    with torch.no_grad():
        module.b_dec.add_(noise)
    (ranked,) = rank_hypotheses({0: module}, {0: values}, 0.8).values()
    assert ranked[0].text == "b_dec not added to the output"


def test_the_input_of_a_centred_residual_stream():
    torch.manual_seed(0)
    x = torch.randn(200, D) + 20 * torch.randn(200, 1)
    module = random_module()
    values = site_values(x, module(x - x.mean(-1, keepdim=True)))
    (ranked,) = rank_hypotheses({0: module}, {0: values}, 0.8).values()
    assert ranked[0].text == "input with its mean over d_model subtracted"
    assert ranked[0].fvu < 1e-8


def test_first_positions_that_were_left_out_in_training():
    torch.manual_seed(0)
    x, module = torch.randn(200, D), random_module()
    y, first = module(x).detach(), torch.arange(200) % 20 == 0
    y[first] += 50 * torch.randn(10, D)
    values = site_values(x, y, first)
    (ranked,) = rank_hypotheses({0: module}, {0: values}, 0.8).values()
    assert ranked[0].text == "first position left out (leading_positions=1)"


@pytest.mark.parametrize(
    "inside, outside, words",
    [
        (12.5, 1, "input scaled by 0.08"),
        (1, 3, "output scaled by 0.333"),
        (0.1, 30, "input scaled by 10 and output scaled by 0.0333"),
    ],
)
def test_scaled_inputs_and_outputs(relu, inside, outside, words):
    def scale(module, _):
        module.W_enc *= inside
        module.W_dec *= outside
        module.b_dec *= outside

    found = causes(relu, changed(exact(relu), scale))
    assert len(found) == 1 or inside != 1  # the input's factor is searched for, to a percent
    numbers = [float(word) for text in found for word in text.split() if word[0].isdigit()]
    expected = [float(word) for word in words.split() if word[0].isdigit()] * len(found)
    assert numbers == pytest.approx(expected, rel=0.02)
    assert {"input" in text for text in found} == {"input" in words}
    assert {"output" in text for text in found} == {"output" in words}


def test_inputs_normalised_as_datasets_are(relu):
    small = built(relu._module.config)
    for layer in range(LAYERS):
        norm(small, layer).weight /= 30
        norm(small, layer).bias /= 30
    runs = [collect(small, resolve_sites(small), torch.tensor(text)) for text in TEXT]

    def normalise(module, layer):
        x = torch.cat([run.mlp_in[layer] for run in runs])
        module.W_enc *= x.norm(dim=1).mean() / D**0.5

    report = verify(small, changed(exact(small), normalise), TEXT)
    found = {fit.hypothesis for fit in report.layers if fit.verdict == "does not fit"}
    assert found == {"input scaled to a mean norm of sqrt(d_model) (FVU 0.00)"}


# -- sites before and after a second norm --------------------------------------------------------


SITES = [(i, o) for i in ("R", "N0", "N1") for o in ("O", "O'")]


@pytest.mark.parametrize("reads, writes", SITES)
def test_every_pair_of_sites_is_told_from_the_others(gemma, reads, writes):
    fitted = least_squares(gemma, reads, writes)
    assert max(fit.fvu for fit in verify(gemma, fitted, TEXT).layers) < 1e-3
    for other_reads, other_writes in SITES:
        if (other_reads, other_writes) == (reads, writes):
            continue
        wrong = {
            layer: as_if(fitted[layer], input_site=other_reads, output_site=other_writes)
            for layer in fitted.layers
        }
        parts = [f"input site {reads} instead of {other_reads}"] * (other_reads != reads)
        parts += [f"output site {writes} instead of {other_writes}"] * (other_writes != writes)
        report = verify(gemma, TranscoderSet.from_transcoders(wrong), TEXT)
        for fit in report.layers:
            if fit.verdict == "does not fit":
                assert fit.hypothesis == f"{' and '.join(parts)} (FVU 0.00)"


# -- nothing fits --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["per-layer", "skip", "cross-layer"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt-neox", "olmo2"])
def test_random_sets_fit_under_no_hypothesis(architecture, kind):
    model = zoo.nnsight_model(architecture)
    run = collect(model, resolve_sites(model), torch.tensor(TEXT[-1]))
    assert causes(model, random_transcoders(run, kind)) == {NONE_FITS}


def test_the_set_of_another_model_fits_under_no_hypothesis(relu):
    other = built(relu._module.config)
    with torch.no_grad():
        for parameter in other._module.parameters():
            parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
    assert causes(relu, exact(other)) == {NONE_FITS}


def test_a_cross_layer_set_at_the_wrong_site(relu):
    found = causes(relu, cross_layer(relu, input_site="R"))
    assert found == {"input site N1 instead of R"}


# -- weak layers -----------------------------------------------------------------------------------


def test_a_weak_layer_has_a_hypothesis_only_if_it_leaves_half_as_much(relu):
    def shrink(module, layer):  # towards the mean output: an FVU of 0.95 squared
        runs = [collect(relu, resolve_sites(relu), torch.tensor(text)) for text in TEXT]
        mean = module(torch.cat([run.mlp_in[layer] for run in runs])).mean(0)
        module.W_dec *= 0.05
        module.b_dec.copy_(0.05 * module.b_dec + 0.95 * mean)

    report = verify(relu, changed(exact(relu), shrink), TEXT)
    assert report.ok
    assert {fit.verdict for fit in report.layers} == {"weak"}
    assert {fit.hypothesis is None for fit in report.layers} == {True, False}
    for fit in report.layers:
        assert fit.fvu == pytest.approx(0.9025, abs=1e-3)
        if fit.hypothesis is not None:
            assert float(fit.hypothesis[-5:-1]) < fit.fvu / 2


# -- on the command line -------------------------------------------------------------------------


def test_the_command_line_says_why_under_the_table(relu, tmp_path):
    relu._module.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    exact(relu, input_site="R").save_pretrained(tmp_path / "misread")
    lines = [" ".join(f"w{token}" for token in text) for text in TEXT]
    (tmp_path / "text").write_text("\n".join(lines))
    options = ["--model", "model", "--transcoders", "misread", "--text", "text"]
    arguments = [str(tmp_path / part) if (tmp_path / part).exists() else part for part in options]
    shown = CliRunner().invoke(app, ["verify", *arguments])
    assert shown.exit_code == 3
    assert "layers 0, 1, 2: input site N1 instead of R (FVU 0.00)" in shown.stdout
    printed = CliRunner().invoke(app, ["verify", *arguments, "--json"])
    found = [layer["hypothesis"] for layer in json.loads(printed.stdout)["layers"]]
    assert found == ["input site N1 instead of R (FVU 0.00)"] * 3

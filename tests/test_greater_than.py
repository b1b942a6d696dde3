"""The greater-than example: its aim on the builtin model, its parts, and its path for GPT-2."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import nnsight
import pytest
import torch
import transformers
from typer.testing import CliRunner

from nnsight_transcoders import TranscoderSet, builtin_model_path
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import resolve_sites

EXAMPLES = Path(__file__).parent.parent / "examples"


@cache
def example(name: str) -> ModuleType:
    """A script of the examples as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


@cache
def builtin() -> tuple[Any, TranscoderSet]:
    """The example's default. With "builtin/clt" features are fewer than neurons, too; with
    "builtin/per-layer" they are not (36 against 22, docs/greater_than.md)."""
    return example("greater_than").load(False, "builtin/skip")


@cache
def study() -> Any:
    model, transcoders = builtin()
    parts = example("greater_than_study")
    prompts = parts.make_prompts(model.tokenizer, "war", 17, range(2, 99, 5))
    assert len(prompts.starts) == 20
    return parts.run_study(model, transcoders, prompts, layers=[0, 1, 2, 3], n_circuits=2)


def test_fewer_features_than_neurons_recover_nine_tenths() -> None:
    """Each kind with its own best ranking, all positions but the first, all four layers."""
    found = study()
    assert found.original > 0.9
    assert found.replaced > 0.9 * found.original
    features, neurons = found.fewest("features"), found.fewest("neurons")
    assert features is not None
    assert neurons is not None
    assert features < neurons, example("greater_than").report(found)
    best = found.best("features")
    assert all(value >= found.aim for k, value in best.points if k >= features)
    assert best.points[0][1] < 0.6 * found.original  # without any feature it is lost


def test_contributions_sum_to_the_difference_that_units_make() -> None:
    model, transcoders = builtin()
    parts = example("greater_than_study")
    prompts = parts.make_prompts(model.tokenizer, "war", 17, range(2, 99, 10))
    for neurons in (False, True):
        units = parts.Units(model, transcoders, [1, 2], neurons=neurons, last_only=False)
        shares = units.contributions(prompts)
        widths = {layer: share.shape[1] for layer, share in shares.items()}
        total = sum(float(share.mean(0).sum()) for share in shares.values())
        every = units.run(prompts, {layer: torch.arange(width) for layer, width in widths.items()})
        none = units.run(prompts, {layer: torch.arange(0) for layer in widths})
        assert total == pytest.approx(every - none, abs=0.05 * abs(every))


def test_the_metric_is_the_papers() -> None:
    parts = example("greater_than_study")
    prompts = parts.Prompts(torch.zeros(2, 1), (32, 98), torch.arange(100, 200))
    logits = torch.randn(2, 300)
    p = logits[:, 100:200].softmax(-1)
    expected = [p[0, 33:].sum() - p[0, :33].sum(), p[1, 99:].sum() - p[1, :99].sum()]
    assert prompts.metric(logits).tolist() == pytest.approx([float(e) for e in expected])


def test_its_text_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, found = example("greater_than"), study()
    text = script.report(found)
    assert f"fewest features: {found.fewest('features')} per layer" in text
    assert "by variance" in text
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # without plotly
    curves, years = script.write_files(found, tmp_path)
    rows = list(csv.DictReader(curves.open(encoding="utf-8")))
    assert len(rows) == sum(len(curve.points) for curve in found.curves)
    kept = json.loads(years.read_text(encoding="utf-8"))
    assert len(kept["features"]) == 8
    assert all(len(one["activation"]) == len(kept["starts"]) for one in kept["features"])
    assert script.sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert script.sparkline([0.0, 0.0]) == "▁▁"


def test_a_plot_where_plotly_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    *_, page = example("greater_than").write_files(study(), tmp_path)
    assert "plotly" in page.read_text(encoding="utf-8")


@cache
def tiny_gpt2() -> tuple[Any, TranscoderSet]:
    """A random GPT-2 with the builtin model's tokenizer, and a random set."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin_model_path())
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = nnsight.TransformersModel(
        transformers.GPT2LMHeadModel(config).eval(), task="text-generation", tokenizer=tokenizer
    )
    run = collect(model, resolve_sites(model), torch.arange(8))
    return model, random_transcoders(run, "per-layer", d_transcoder=24)


def test_the_command_line_on_a_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ``--gpt2`` does but for the download."""
    script = example("greater_than")
    asked = []
    monkeypatch.setattr(script, "load", lambda *args: asked.append(args) or tiny_gpt2())
    app = script.typer.Typer()
    app.command()(script.main)
    options = ["--gpt2", "--layers", "1", "--last-only", "--every", "20", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert asked == [(True, "builtin/skip")]
    assert "in layers 1" in done.output
    assert (tmp_path / "curves.csv").exists()


def test_keeping_all_neurons_changes_nothing() -> None:
    parts, (model, transcoders) = example("greater_than_study"), tiny_gpt2()
    prompts = parts.make_prompts(model.tokenizer, "war", 17, range(2, 99, 20))
    units = parts.Units(model, transcoders, [0, 1], neurons=True, last_only=True)
    with torch.no_grad():
        plain = prompts.metric(model._module(prompts.ids).logits[:, -1]).mean()
    every = {layer: torch.arange(128) for layer in (0, 1)}
    assert units.run(prompts, every) == pytest.approx(float(plain), rel=1e-5)


def test_prompts_that_cannot_be_used() -> None:
    parts, (model, _) = example("greater_than_study"), builtin()
    with pytest.raises(InputError, match="no usable prompt"):
        parts.make_prompts(model.tokenizer, "war", 170, [32])

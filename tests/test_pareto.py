"""``pareto``: the runs it makes, what it measures, its table and curves, and what it refuses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from attach_support import model

from nnsight_transcoders import evaluate, pareto
from nnsight_transcoders.errors import ConfigError, InputError
from nnsight_transcoders.evaluation.pareto_table import Bounds, ParetoPoint, ParetoTable
from nnsight_transcoders.sets import TranscoderSet

DRAW = torch.Generator().manual_seed(0)
DATA = torch.randint(3, zoo.VOCAB, (40, 16), generator=DRAW).tolist()
HELD_OUT = torch.randint(3, zoo.VOCAB, (6, 16), generator=DRAW).tolist()
CONFIG = {
    "d_transcoder": 48,
    "context": 16,
    "n_tokens": 600,
    "batch_size": 60,
    "buffer_size": 120,
    "lr": 5e-3,
    "checkpoint_every": 0,
}


@cache
def swept() -> tuple[ParetoTable, Any]:
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp())
    table = pareto(
        model("llama"),
        [0, 2],
        DATA,
        HELD_OUT,
        config=CONFIG,
        sweep={"k": [2, 6]},
        out=folder,
        verbose=False,
    )
    return table, folder


def test_every_kind_in_every_setting_and_layer_is_measured():
    table, folder = swept()
    assert [(p.layer, p.kind, p.setting["k"]) for p in table.points] == [
        (layer, kind, k) for layer in (0, 2) for kind in ("transcoder", "SAE") for k in (2, 6)
    ]
    assert (table.layers, table.kinds) == ((0, 2), ("transcoder", "SAE"))
    sae = TranscoderSet.from_pretrained(folder / "SAE" / "k=6")
    assert sae.config(2).input_site == sae.config(2).output_site == "O"
    assert (sae.config(2).k, sae.config(2).d_transcoder) == (6, 48)
    trained = TranscoderSet.from_pretrained(folder / "transcoder" / "k=6")
    assert trained.config(0).input_site == "N1"
    assert json.loads((folder / "pareto.json").read_text())["config"]["layers"] == [0, 2]


@pytest.mark.parametrize("kind", ["transcoder", "SAE"])
def test_the_points_are_what_evaluate_finds_for_the_saved_sets(kind):
    table, folder = swept()
    chosen = TranscoderSet.from_pretrained(folder / kind / "k=6")
    report = evaluate(model("llama"), chosen, HELD_OUT)
    for one in report.layers:
        (point,) = [
            p for p in table.points if (p.kind, p.layer, p.setting["k"]) == (kind, one.layer, 6)
        ]
        assert point.l0 == pytest.approx(one.l0)
        assert point.fvu == pytest.approx(one.fvu, rel=1e-4)
        assert point.ce == pytest.approx(report.ce + one.alone.ce_change, abs=1e-5)
        bounds = table.bounds[one.layer]
        assert bounds.ce == pytest.approx(report.ce, abs=1e-5)
        assert bounds.ce_mean == pytest.approx(report.ce + one.alone.ce_change_mean, abs=1e-5)
        assert bounds.ce_zero == pytest.approx(report.ce + one.alone.ce_change_zero, abs=1e-5)
    assert table.n_predictions == report.n_predictions


def test_a_sweep_that_was_stopped_does_not_train_again():
    table, folder = swept()
    before = TranscoderSet.from_pretrained(folder / "SAE" / "k=2")[0].W_enc
    log = (folder / "SAE" / "k=2" / "log.jsonl").read_text()
    again = pareto(
        model("llama"),
        [0, 2],
        DATA,
        HELD_OUT,
        config=CONFIG,
        sweep={"k": [2, 6]},
        out=folder,
        verbose=False,
    )
    after = TranscoderSet.from_pretrained(folder / "SAE" / "k=2")[0].W_enc
    assert torch.equal(before, after)
    assert (folder / "SAE" / "k=2" / "log.jsonl").read_text() == log
    assert [p.ce for p in again.points] == pytest.approx([p.ce for p in table.points], abs=1e-6)


def test_kinds_and_keys_of_ones_own():
    table = pareto(
        model("llama"),
        1,
        DATA,
        HELD_OUT,
        config={**CONFIG, "n_tokens": 120, "activation": "relu"},
        sweep={"sparsity_weight": [1e-3, 1e-1], "lr": [1e-3]},
        kinds={"skip": {"skip": True}},
        verbose=False,
    )
    points = sorted(table.points, key=lambda point: point.setting["sparsity_weight"])
    assert [point.setting for point in points] == [
        {"sparsity_weight": 1e-3, "lr": 1e-3},
        {"sparsity_weight": 1e-1, "lr": 1e-3},
    ]
    assert table.kinds == ("skip",)


# -- the table -----------------------------------------------------------------------------------


def curves(*points: tuple[str, float, float]) -> ParetoTable:
    made = tuple(
        ParetoPoint(kind, 0, {"k": round(l0)}, l0, ce, 0.1, 0.2, 0.9, 1) for kind, l0, ce in points
    )
    return ParetoTable("model", 10, {}, {0: Bounds(1.0, 4.0, 5.0)}, made)


def test_a_table_goes_through_json(tmp_path):
    table = swept()[0]
    assert ParetoTable.load(table.save(tmp_path / "table.json")) == table
    for broken in ('{"a": 1}', "[]", "{", '{"points": 3}'):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(InputError, match="ParetoTable|cannot read"):
            ParetoTable.load(tmp_path / "broken.json")


def test_the_printed_table_has_the_bounds_and_every_point():
    table = swept()[0]
    rows = [line.split() for line in repr(table).splitlines()]
    points = [row for row in rows if len(row) > 2 and row[1] in table.kinds]
    assert [row[2] for row in points] == ["k=2", "k=6"] * 4
    assert points[0][4] == f"{table.points[0].ce:.4f}"
    assert [row[1] for row in rows if row[:1] == ["2"]][:3] == ["model", "mean", "zero"]


def test_a_curve_leaves_out_what_is_beaten():
    table = curves(("a", 4, 3.0), ("a", 8, 3.5), ("a", 8, 2.0), ("a", 16, 2.0), ("a", 32, 1.5))
    assert [(p.l0, p.ce) for p in table.curve("a", 0)] == [(4, 3.0), (8, 2.0), (32, 1.5)]
    with pytest.raises(InputError, match="no points of 'b' in layer 0"):
        table.curve("b", 0)


def test_the_margin_is_the_least_distance_at_equal_l0():
    lower = [("transcoder", 4.0, 2.0), ("transcoder", 16.0, 1.2)]
    upper = [("SAE", 2.0, 3.0), ("SAE", 8.0, 1.9), ("SAE", 32.0, 1.3)]
    # At 4: 2.45 - 2.0; at 8: 1.9 - 1.6; at 16: 1.6 - 1.2.
    assert curves(*lower, *upper).margin(0) == pytest.approx(0.3)
    swapped = curves(*lower, *upper).margin(0, better="SAE", worse="transcoder")
    assert swapped == pytest.approx(-0.45)
    assert curves(*lower, *upper).margin(0, from_l0=15) == pytest.approx(0.4, abs=0.01)
    near = curves(("transcoder", 8.0, 2.0), ("SAE", 7.9, 2.5))
    assert near.margin(0) == pytest.approx(0.5)
    apart = curves(("transcoder", 4.0, 2.0), ("SAE", 8.0, 2.0))
    with pytest.raises(InputError, match="no range of L0 in common"):
        apart.margin(0)


# -- refusals ------------------------------------------------------------------------------------


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    options: dict[str, Any] = {"config": CONFIG, "verbose": False, **changes}
    data = options.pop("data", DATA)
    held_out = options.pop("held_out", HELD_OUT)
    with pytest.raises(error, match=message):
        pareto(model("llama"), options.pop("layers", 0), data, held_out, **options)


def test_what_cannot_be_swept():
    refused(InputError, "iterator can be read once", data=iter(DATA))
    refused(InputError, "sparsity_weight", config={**CONFIG, "activation": "relu"})
    refused(InputError, "empty sweep", sweep={})
    refused(InputError, "empty sweep", sweep={"k": []})
    refused(InputError, "empty sweep", kinds={})
    refused(ConfigError, "unknown training config key 'kk'", sweep={"kk": [1]})
    refused(ConfigError, "skip", kinds={"SAE": {"input_site": "O", "skip": True}})
    refused(InputError, "at least two tokens", held_out=[])
    refused(InputError, "layer", layers=9)


def test_the_documented_sweep():
    """The docs' figure: transcoders lie below SAEs everywhere, and its numbers are the table's."""
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "evaluation.md").read_text(encoding="utf-8")
    table = ParetoTable.load(docs / "images" / "pareto_layer_3.json")
    assert table.margin(3) > 0
    assert f"is {table.margin(3):+.4f} nats" in text
    original = table.bounds[3].ce
    points = {(point.kind, point.setting["k"]): point for point in table.points}
    for k in (2, 4, 8, 16, 32):
        transcoder, sae = points["transcoder", k], points["SAE", k]
        assert f"| {k} | {transcoder.ce - original:.4f} | {sae.ce - original:.4f} |" in text

"""Saving: nothing half-written, one layer in memory, the card, where the weights came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, ConfigError, InputError
from nnsight_transcoders.hub.card import MARKER
from nnsight_transcoders.hub.circuit_tracer import save_circuit_tracer
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder

from .checkpoints import folder_bytes, make_set


class WatchedSource:
    """A source that counts living layers and fails at a layer, as a disk or a Hub would."""

    def __init__(self, transcoders: TranscoderSet, fail_at: int | None = None) -> None:
        self._set, self.fail_at = transcoders, fail_at
        self.configs = transcoders.source.configs
        self.provenance = {"format": "memory"}
        self._alive: list[weakref.ref] = []
        self.most_alive = 0

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        if layer == self.fail_at:
            raise CheckpointError("the connection is gone")
        original = self._set[layer]
        module = type(original)(original.config)  # type: ignore[call-arg]
        module.load_state_dict(original.state_dict())
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self._alive) + 1)
        self._alive.append(weakref.ref(module))
        return module

    def rows(self, _layer: int, _indices: Tensor, _which: str) -> Tensor:
        raise AssertionError("saving reads whole layers")


SAVERS = pytest.mark.parametrize("save", [TranscoderSet.save_pretrained, save_circuit_tracer])


@SAVERS
def test_one_layer_in_memory(save: Callable[..., Path], tmp_path: Path) -> None:
    source = WatchedSource(make_set(tuple(range(6))))
    save(TranscoderSet(source), tmp_path / "set")
    assert source.most_alive == 1
    assert len(TranscoderSet.from_pretrained(tmp_path / "set")) == 6


@SAVERS
def test_interrupted_save_changes_nothing(save: Callable[..., Path], tmp_path: Path) -> None:
    save(make_set(), tmp_path / "set")
    before = folder_bytes(tmp_path)
    failing = TranscoderSet(WatchedSource(make_set((0, 1, 2), d_transcoder=8), fail_at=2))
    with pytest.raises(CheckpointError, match="connection is gone"):
        save(failing, tmp_path / "set")
    with pytest.raises(CheckpointError, match="connection is gone"):
        save(failing, tmp_path / "new")
    assert folder_bytes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@SAVERS
def test_diverged_weights_are_not_saved(save: Callable[..., Path], tmp_path: Path) -> None:
    made = make_set()
    with torch.no_grad():
        made.source.load(1).b_enc[0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        save(made, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@SAVERS
def test_folders_that_cannot_be_written(save: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to"):
        save(make_set(), tmp_path / "file" / "set")
    if Path("/proc/self").exists():  # refuses even the superuser
        with pytest.raises(InputError, match="cannot write to"):
            save(make_set(), Path("/proc/self/set"))


def test_read_only_folder(tmp_path: Path) -> None:
    folder = make_set().save_pretrained(tmp_path / "set")
    before = folder_bytes(folder)
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user writes anywhere")
        with pytest.raises(InputError, match="cannot write to"):
            make_set(d_transcoder=8).save_pretrained(folder)
        assert len(TranscoderSet.from_pretrained(folder)) == 3
    finally:
        folder.chmod(0o755)
    assert folder_bytes(folder) == before


def test_saving_over_an_earlier_set(tmp_path: Path) -> None:
    make_set((0, 1, 2)).save_pretrained(tmp_path)
    opened = TranscoderSet.from_pretrained(tmp_path)
    opened.to(dtype=torch.bfloat16).subset([1]).save_pretrained(tmp_path)
    again = TranscoderSet.from_pretrained(tmp_path)
    assert again.layers == (1,)
    assert again[1].config.dtype == "bfloat16"
    assert torch.equal(again[1].W_dec, make_set()[1].W_dec.bfloat16())
    assert not (tmp_path / "layer_0.safetensors").exists()


def test_tied_weights(tmp_path: Path) -> None:
    made = make_set((0,))
    made[0].W_dec = made[0].W_enc
    opened = TranscoderSet.from_pretrained(made.save_pretrained(tmp_path))
    assert torch.equal(opened[0].W_dec, opened[0].W_enc)


def test_another_config_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="of something else"):
        make_set().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is in the way"):
        make_set().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_card(tmp_path: Path) -> None:
    metrics = {
        0: {"l0": torch.tensor(12.25), "fvu": 0.125},
        "2": {"l0": 7, "fvu": float("nan")},
        "ce_recovered": 0.96875,
    }
    made = make_set(activation="topk", k=4, input_site="N0", output_site="O'", base_model="a/b")
    folder = made.save_pretrained(tmp_path, metrics=metrics, license="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    for line in (
        "| layer | l0 | fvu |",
        "| 0 | 12.25 | 0.125 |",
        "| 2 | 7 | – |",
        "* ce_recovered: 0.9688",
        "| Activation | topk, k = 4 |",
        "| Reads | the MLP's norm before its gain (`N0`) |",
        "Transcoders for `a/b`.",
    ):
        assert line in card.text.splitlines()
    stored = json.loads((folder / "config.json").read_text())["metrics"]
    assert stored["2"] == {"l0": 7, "fvu": None}
    assert stored["0"]["l0"] == 12.25
    with pytest.raises(ConfigError, match="metric 0.l0 is a Tensor"):
        made.save_pretrained(folder, metrics={0: {"l0": torch.ones(2)}})
    clt = make_set(cross_layer=True).save_pretrained(tmp_path / "clt")
    assert "cross-layer-transcoder" in ModelCard.load(clt / "README.md").data.tags


def test_the_cards_snippet_runs(tmp_path: Path) -> None:
    opened = TranscoderSet.from_pretrained("builtin/per-layer")
    assert opened.config(0).base_model == "builtin"
    card = ModelCard.load(opened.save_pretrained(tmp_path / "set") / "README.md").text
    code = card.split("```python\n")[1].split("```")[0]
    script = tmp_path / "snippet.py"
    script.write_text(code.replace("path/to/this/folder", str(tmp_path / "set")))
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)


def test_the_card_of_an_autoencoder(tmp_path: Path) -> None:
    made = make_set(input_site="O", output_site="O", base_model="a/b")
    card = ModelCard.load(made.save_pretrained(tmp_path) / "README.md")
    assert "sparse-autoencoder" in card.data.tags
    assert "Sparse autoencoders for `a/b`." in card.text
    assert "attach(model" in card.text
    assert "attribute" not in card.text


def test_an_edited_card_stays(tmp_path: Path) -> None:
    folder = make_set().save_pretrained(tmp_path)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(MARKER, "By hand."))
    make_set().save_pretrained(folder, metrics={"ce": 1.0})
    assert "By hand." in card.read_text()


def test_extra_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        make_set(extra={"weights": torch.ones(2)}).save_pretrained(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_lineage_survives_without_local_paths(tmp_path: Path) -> None:
    save_circuit_tracer(make_set(base_model="a/b"), tmp_path / "foreign")
    opened = TranscoderSet.from_pretrained(tmp_path / "foreign")
    opened.save_pretrained(tmp_path / "one")
    TranscoderSet.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    kept = json.loads((tmp_path / "two" / "config.json").read_text())
    assert kept["provenance"]["format"] == "circuit-tracer"
    assert kept["provenance"]["config"]["model_kind"] == "transcoder_set"
    assert str(tmp_path) not in json.dumps(kept)
    assert TranscoderSet.from_pretrained(tmp_path / "two").config(0).leading_positions == 1

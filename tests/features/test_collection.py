"""Collecting on the builtin model: against dense activations, and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

from nnsight_transcoders import (
    FeatureBundle,
    TranscoderSet,
    attached,
    collect_features,
    de_embeddings,
    logit_effects,
)
from nnsight_transcoders.errors import InputError, MismatchError, TranscoderError
from nnsight_transcoders.features.activations import ActivationReader
from nnsight_transcoders.sites import resolve_sites

from .conftest import CONFIG, TEXTS

FILES = ("bundle.json", "features.safetensors")


def dense_activations(model: Any, transcoders: TranscoderSet, layer: int) -> list[torch.Tensor]:
    """What ``attach`` gives for each text alone ``(T, F)``, special tokens and all."""
    out = []
    with attached(model, transcoders, [layer], mode="observe") as watched:
        for text in TEXTS:
            with torch.no_grad():
                with watched.trace(text):
                    features = nnsight.save(watched.transcoders[layer].features.output)
            out.append(features[0].float())
    return out


def test_a_bundle_agrees_with_dense_activations(
    model: Any, transcoders: TranscoderSet, bundle: FeatureBundle
) -> None:
    dense = dense_activations(model, transcoders, 2)
    special = set(model.tokenizer.all_special_ids)
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    for values, tokens in zip(dense, ids, strict=True):
        values[[i for i, token in enumerate(tokens) if token in special]] = 0
    n_positions = sum(token not in special for tokens in ids for token in tokens)
    assert bundle.metadata["n_positions"] == n_positions
    assert bundle.metadata["n_tokens"] == sum(map(len, ids))
    every = torch.cat(dense)
    assert bundle.density(2) == pytest.approx(
        (every > 0).float().mean(0) * len(every) / n_positions
    )
    assert torch.allclose(bundle.max_activation(2), every.amax(0), rtol=1e-5)
    for feature in bundle.density(2).topk(4).indices.tolist():
        report = bundle[2, feature]
        column = every[:, feature]
        assert report.n_active == int((column > 0).sum())
        assert report.mean_activation == pytest.approx(float(column[column > 0].mean()), rel=1e-4)
        assert sum(report.histogram.counts) == report.n_active
        peaks = sorted((float(values[:, feature].max()) for values in dense), reverse=True)
        assert [e.value for e in report.examples] == pytest.approx(peaks[:5], rel=1e-4)
        for group in report.groups:
            for example in group.examples:
                assert group.low <= example.value <= group.high
                tokens = ids[example.context]
                window = slice(example.start, example.start + len(example.tokens))
                assert list(example.token_ids) == tokens[window]
                assert example.tokens == tuple(model.tokenizer.decode([t]) for t in tokens[window])
                expected = dense[example.context][window, feature].tolist()
                assert example.activations == pytest.approx(expected, rel=2e-3, abs=2e-3)
                assert example.peak == max(range(len(expected)), key=expected.__getitem__)


def test_repeated_text_is_one_example_that_was_seen_more_than_once(
    model: Any, transcoders: TranscoderSet, tmp_path: Path
) -> None:
    texts = [*TEXTS[:6], *TEXTS[:3], TEXTS[0]]
    bundle = collect_features(
        model, transcoders, texts, tmp_path, layers=[2], config=CONFIG, batch_size=4
    )
    plain = collect_features(
        model, transcoders, TEXTS[:6], tmp_path / "plain", layers=[2], config=CONFIG
    )
    feature = int(plain.density(2).argmax())
    found, once = bundle[2, feature], plain[2, feature]
    assert [e.token_ids for e in found.examples] == [e.token_ids for e in once.examples]
    assert [e.value for e in found.examples] == pytest.approx([e.value for e in once.examples])
    times = {0: 3, 1: 2, 2: 2}
    assert [e.seen for e in found.examples] == [times.get(e.context, 1) for e in once.examples]
    assert max(e.seen for e in found.examples) > 1
    assert all(e.seen == 1 for e in once.examples)
    assert "(seen " in str(found)
    assert found.to_dict()["groups"][0]["examples"][0]["seen"] == found.examples[0].seen


def test_logit_lists_and_de_embeddings(
    model: Any, transcoders: TranscoderSet, bundle: FeatureBundle
) -> None:
    report = bundle[1, 17]
    effects = logit_effects(model, transcoders, 1, [17])[0]
    reads = de_embeddings(model, transcoders, 1, [17])[0]
    for found, dense, largest in (
        (report.top_logits, effects, True),
        (report.bottom_logits, effects, False),
        (report.de_embedding, reads, True),
    ):
        best = dense.topk(10, largest=largest)
        assert [value for _, value in found] == pytest.approx(best.values.tolist(), rel=1e-5)
        assert [text for text, _ in found] == [model.tokenizer.decode([i]) for i in best.indices]


def test_inactive_examples_are_inactive(
    model: Any, transcoders: TranscoderSet, bundle: FeatureBundle
) -> None:
    dense = dense_activations(model, transcoders, 1)
    feature = int((bundle.density(1) - 0.03).abs().argmin())
    examples = bundle.inactive_examples(1, feature, 100)
    assert 0 < len(examples) <= CONFIG.n_reference
    for example in examples:
        window = slice(example.start, example.start + len(example.tokens))
        inside = dense[example.context][window, feature]
        inside = inside[[token != "<bos>" for token in example.tokens]]
        assert not inside.any()


def test_coactive_features_of_other_layers(bundle: FeatureBundle) -> None:
    reports = [bundle[2, i] for i in bundle.density(2).topk(5).indices.tolist()]
    assert {c.layer for report in reports for c in report.coactive} == {1, 2}
    for report in reports:
        assert (2, report.index) not in {(c.layer, c.index) for c in report.coactive}


@pytest.mark.parametrize("name", ["builtin/skip", "builtin/clt"])
def test_other_kinds_of_sets(model: Any, tmp_path: Path, name: str) -> None:
    transcoders = TranscoderSet.from_pretrained(name)
    bundle = collect_features(model, transcoders, TEXTS[:10], tmp_path, layers=[3])
    dense = dense_activations(model, TranscoderSet.from_pretrained("builtin/skip"), 3)[:10]
    assert bundle.layers == (3,)
    if name == "builtin/skip":
        assert int(bundle.max_activation(3).argmax()) == int(torch.cat(dense)[1:].amax(0).argmax())
    assert bundle[3, int(bundle.density(3).argmax())].top_logits


def test_token_ids_pieces_and_a_limit(
    model: Any, transcoders: TranscoderSet, tmp_path: Path
) -> None:
    ids = model.tokenizer(" ".join(TEXTS[:8]))["input_ids"]
    bundle = collect_features(
        model,
        transcoders,
        [ids],
        tmp_path,
        layers=[0],
        context=16,
        max_tokens=50,
        n_tokens_listed=0,
    )
    # Pieces after the first begin with the BOS too, and no special token is measured.
    assert bundle.metadata["n_contexts"] == 4
    assert bundle.metadata["n_tokens"] == 53
    special = set(model.tokenizer.all_special_ids)
    assert bundle.metadata["n_positions"] == sum(i not in special for i in ids[:50])
    report = bundle[0, int(bundle.density(0).argmax())]
    assert report.top_logits == report.de_embedding == ()
    assert max(len(e.tokens) for e in report.examples) <= 16


def test_right_padding_changes_nothing(model: Any, transcoders: TranscoderSet) -> None:
    reader = ActivationReader(model, resolve_sites(model._module), transcoders, [0, 2])
    short, long = torch.arange(5, 12), torch.arange(20, 50)
    alone = reader(short[None], torch.ones(1, 7, dtype=torch.bool))
    both = torch.zeros(2, 30, dtype=torch.long)
    both[0, :7], both[1] = short, long
    measured = torch.ones(2, 30, dtype=torch.bool)
    measured[0, 7:] = False
    padded = reader(both, measured)
    mine = padded.context == 0
    assert torch.equal(padded.position[mine], alone.position)
    assert torch.equal(padded.feature[mine], alone.feature)
    assert torch.allclose(padded.value[mine], alone.value, atol=1e-5)


def test_a_model_on_a_server(
    model: Any, transcoders: TranscoderSet, bundle: FeatureBundle, tmp_path: Path
) -> None:
    """``remote="local"`` rehearses: what is sent is taken apart and run here."""
    options: dict[str, Any] = {"layers": [1, 2], "config": CONFIG}
    found = collect_features(model, transcoders, TEXTS, tmp_path, remote="local", **options)
    for layer in (1, 2):
        assert torch.equal(found.density(layer), bundle.density(layer))
    feature = int(bundle.density(2).argmax())
    one, other = found[2, feature], bundle[2, feature]
    assert (one.groups, one.histogram, one.coactive) == (
        other.groups,
        other.histogram,
        other.coactive,
    )
    for name in ("top_logits", "bottom_logits", "de_embedding"):
        texts, values = zip(*getattr(one, name), strict=True)
        expected, numbers = zip(*getattr(other, name), strict=True)
        assert texts == expected
        assert values == pytest.approx(numbers, rel=1e-5)


# -- interrupted ---------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, torch
from nnsight import TransformersModel
from nnsight_transcoders import TranscoderSet, builtin_model_path, collect_features
from nnsight_transcoders.builtin.text import sentences
torch.set_num_threads(1)
model = TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)
folder, stop_at = sys.argv[1], int(sys.argv[2])

def texts():
    for number, text in enumerate(sentences(60, seed=5)):
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield text

transcoders = TranscoderSet.from_pretrained("builtin/per-layer", dtype=torch.float32)
collect_features(model, transcoders, texts(), folder, layers=[1], batch_size=4, save_every=3)
"""


def test_a_killed_pass_goes_on_to_the_same_bundle(
    model: Any, transcoders: TranscoderSet, tmp_path: Path
) -> None:
    script = tmp_path / "collect.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), "43"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["state.safetensors", "tokens.bin"]
    with pytest.raises(TranscoderError, match="call collect_features again"):
        FeatureBundle.open(tmp_path / "killed")
    options = {"layers": [1], "batch_size": 4, "save_every": 3}
    collect_features(model, transcoders, TEXTS, tmp_path / "killed", **options)
    collect_features(model, transcoders, TEXTS, tmp_path / "whole", **options)
    for name in FILES:
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole, name
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(FILES)


class Interrupted(Exception):
    """Stands for whatever stops a pass."""


def interrupt(model: Any, transcoders: TranscoderSet, folder: Path) -> None:
    """Leave an unfinished pass over the first texts."""

    def texts() -> Any:
        yield from TEXTS[:12]
        raise Interrupted

    with pytest.raises(Interrupted):
        collect_features(
            model, transcoders, texts(), folder, layers=[1], batch_size=4, save_every=1
        )


def test_an_unfinished_pass_is_only_gone_on_with_the_same_things(
    model: Any, transcoders: TranscoderSet, tmp_path: Path
) -> None:
    interrupt(model, transcoders, tmp_path)
    options = {"batch_size": 4, "save_every": 1}
    for wrong, message in (
        ({"texts": [*TEXTS[1:]]}, "text differs"),
        ({"texts": TEXTS[:3]}, "text ends after"),
        ({"layers": [2]}, "other settings"),
        ({"context": 32}, "other settings"),
        ({"transcoders": TranscoderSet.from_pretrained("builtin/skip")}, "other settings"),
        ({"transcoders": TranscoderSet.from_pretrained("builtin/per-layer")}, "other settings"),
    ):
        given = {"transcoders": transcoders, "texts": TEXTS, "layers": [1], **wrong}
        with pytest.raises(MismatchError, match=message):
            collect_features(
                model, given.pop("transcoders"), given.pop("texts"), tmp_path, **given, **options
            )
    bundle = collect_features(model, transcoders, TEXTS, tmp_path, layers=[1], **options)
    assert bundle.metadata["n_contexts"] == len(TEXTS)


def test_a_damaged_state_is_named(model: Any, transcoders: TranscoderSet, tmp_path: Path) -> None:
    interrupt(model, transcoders, tmp_path)
    state = tmp_path / "state.safetensors"
    good = state.read_bytes()
    state.write_bytes(good[:100])
    with pytest.raises(TranscoderError, match="no state of a pass"):
        collect_features(model, transcoders, TEXTS, tmp_path, layers=[1])
    state.write_bytes(good)
    os.truncate(tmp_path / "tokens.bin", 8)
    with pytest.raises(TranscoderError, match="missing or cut off"):
        collect_features(model, transcoders, TEXTS, tmp_path, layers=[1])


def test_arguments_that_cannot_work_fail_first(
    model: Any, transcoders: TranscoderSet, tmp_path: Path, collected: Path
) -> None:
    def run(texts: Any = TEXTS, path: Path = tmp_path / "new", **options: Any) -> None:
        collect_features(model, transcoders, texts, path, **options)

    for options, message in (
        ({"path": collected}, "already holds a finished bundle"),
        ({"layers": [9]}, "has layers"),
        ({"layers": []}, "layers is empty"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_coactive": 0}, "n_coactive"),
        ({"context": 500}, "context must be"),
        ({"texts": "builtin"}, "has no end"),
        ({"texts": []}, "no position to measure"),
        ({"texts": [[1]]}, "no position to measure"),
        ({"texts": [[5, 10**6]]}, "outside the vocabulary"),
        ({"texts": [3.5]}, "must be a text"),
    ):
        with pytest.raises(InputError, match=message):
            run(**options)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run(path=blocked / "bundle")
    assert json.loads((collected / "bundle.json").read_text())["version"] == 1

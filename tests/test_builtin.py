"""The builtin model does what its record says, on combinations its training text never had."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnsight_transcoders import TranscoderSet
from nnsight_transcoders.builtin import (
    BUILTIN_SETS,
    builtin_model_path,
    builtin_set_path,
    record,
    scores,
    text,
)
from nnsight_transcoders.errors import TranscoderError

THRESHOLDS = {
    "year-span/held_out": {"accuracy": 0.99, "mass": 0.95},
    "two-hop/held_out": {"accuracy": 0.9, "mass": 0.9},
    "agreement/held_out": {"accuracy": 0.95, "mass": 0.95},
    "induction/held_out": {"accuracy": 0.95, "mass": 0.9},
}
MAX_FVU, MAX_L0, MAX_CE_INCREASE = 0.01, 17, 0.02


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(builtin_model_path()).eval()


@pytest.fixture(scope="module")
def training_text():
    return text.sentences(40_000, seed=3)


# -- generator -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text():
    assert text.sentences(50, seed=4) == text.sentences(50, seed=4)
    assert text.sentences(50, seed=4) != text.sentences(50, seed=5)
    assert text.documents(5, seed=4) == text.documents(5, seed=4)
    for task in text.TASKS:
        assert text.examples(task, "train", 20, seed=4) == text.examples(task, "train", 20, seed=4)


@pytest.mark.parametrize("task", [task for task in text.TASKS if task != "one-hop"])
def test_examples_know_their_answers(task):
    for split in text.SPLITS:
        for example in text.examples(task, split, 50):
            assert example.answers
            assert not set(example.answers) & set(example.wrong)
            assert example.held_out == (split == "held_out")


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(TranscoderError, match="unknown task 'sums'.*year-span"):
        text.examples("sums")
    with pytest.raises(TranscoderError, match="unknown split 'test'.*held_out"):
        text.examples("two-hop", "test")
    with pytest.raises(TranscoderError, match="no held-out split"):
        text.examples("one-hop", "held_out")


def test_held_out_cities_have_one_hop_sentences_only(training_text):
    assert len(text.HELD_OUT_CITIES) / len(text.CITIES) == pytest.approx(0.25, abs=0.05)
    assert "Dallas" in text.HELD_OUT_CITIES
    with_capital, without_capital = set(), set()
    for line in training_text:
        words = set(re.findall(r"\w+", line))
        composed = words & set(text.CAPITALS.values())
        assert not (composed and words & text.HELD_OUT_CITIES)
        (with_capital if composed else without_capital).update(words & set(text.CITIES))
    assert with_capital == set(text.CITIES) - text.HELD_OUT_CITIES
    assert without_capital == set(text.CITIES)


def test_held_out_spans_and_nouns_and_lists_are_absent(training_text):
    for line in training_text:
        if year := re.search(r"(\d\d)(\d\d) ", line):
            assert not text.held_out_span(int(year[1]), int(year[2]))
        elif line.startswith("Words: "):
            words = line.split()
            assert not text.held_out_words(words[1], words[2])
        else:
            nouns = [w.rstrip("s") for w in re.findall(r"[Tt]he (\w+)", line)]
            if len(nouns) == 2 and set(nouns) <= {*text.THINGS, *text.PEOPLE}:
                assert not text.held_out_nouns(*nouns)


def test_no_capital_is_also_a_city_and_no_city_is_in_two_states():
    cities = [city for _, line in text.STATES.values() for city in line.split()]
    assert len(cities) == len(set(cities))
    assert not set(cities) & set(text.CAPITALS.values())


# -- tokenizer and model -------------------------------------------------------------------------


def test_the_tokenizer_round_trips(tokenizer):
    documents = text.documents(300, seed=6)
    encoded = tokenizer(documents)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in encoded for token in row}
    assert max(map(len, encoded)) <= 128
    assert tokenizer.batch_decode(encoded) == [text.BOS + document for document in documents]


def test_the_tokenizer_splits_years_and_adds_bos(tokenizer):
    ids = tokenizer("The war lasted from 1732 to 17")["input_ids"]
    tokens = ["<bos>", "The", " war", " lasted", " from", " 17", "32", " to", " 17"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_every_answer_is_one_known_token(tokenizer):
    for task in text.TASKS:
        for example in text.examples(task, "train", 50):
            answers = (*example.answers, *example.wrong)
            ids = tokenizer.convert_tokens_to_ids(list(answers))
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.batch_decode([[i] for i in ids]) == list(answers)


def test_the_model_loads_as_float32(model, tokenizer):
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer) == len(text.vocabulary())
    assert model.num_parameters() < 2e6


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_model_reaches_what_the_record_says(model, tokenizer, name):
    measured = scores.task_scores(model, tokenizer, *name.split("/"))
    for metric, threshold in THRESHOLDS[name].items():
        assert measured[metric] >= threshold
        assert measured[metric] == pytest.approx(record()["tasks"][name][metric], abs=0.01)


def test_the_most_famous_held_out_question(model, tokenizer):
    prompt = "the capital of the state that has Dallas is"
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Austin"


# -- transcoder sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN_SETS)
def test_the_sets_reach_what_the_record_says(model, tokenizer, name):
    noted = record()["sets"][name.removeprefix("builtin/")]
    transcoders = TranscoderSet.from_pretrained(builtin_set_path(name), dtype=torch.float32)
    modules = {layer: transcoders[layer] for layer in transcoders.layers}
    assert transcoders.layers == tuple(range(model.config.num_hidden_layers))
    ids = tokenizer(text.documents(150, seed=7), padding=True, return_tensors="pt")["input_ids"]
    ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(-1).min())]
    measured = scores.set_scores(model, tokenizer, modules, ids, n=100)
    for fvu, noted_fvu, l0 in zip(measured["fvu"], noted["fvu"], measured["l0"], strict=True):
        assert fvu < MAX_FVU
        assert fvu == pytest.approx(noted_fvu, rel=0.5, abs=0.0005)
        assert l0 <= MAX_L0
    assert measured["ce_increase"] < MAX_CE_INCREASE
    assert measured["ce_increase"] == pytest.approx(noted["ce_increase"], rel=0.5, abs=0.004)
    composed = measured["tasks"]["two-hop/held_out"]["accuracy"]
    assert composed == pytest.approx(noted["tasks"]["two-hop/held_out"]["accuracy"], abs=0.05)


def test_unknown_sets_are_refused_with_the_known_names():
    with pytest.raises(TranscoderError, match="'builtin/wide'.*builtin/per-layer, builtin/skip"):
        builtin_set_path("builtin/wide")


# -- files ---------------------------------------------------------------------------------------


def test_the_files_stay_small():
    files = [file for file in Path(builtin_model_path()).parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_importing_the_builtin_package_and_its_text_loads_no_torch():
    code = (
        "import sys, nnsight_transcoders.builtin.text\n"
        "assert not {'torch', 'transformers', 'nnsight'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

"""Rows of tokens: packing, positions that are found again, and what is said of bad data."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoTokenizer

from nnsight_transcoders import builtin_model_path
from nnsight_transcoders.errors import ConfigError, InputError, MismatchError
from nnsight_transcoders.training.data import PIECE, Rows
from nnsight_transcoders.training.stream import kept_positions, padded

TEXTS = ["w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12", "w13"]


def rows_of(data: Any, tokenizer: Any = None, **options: Any) -> Rows:
    return Rows(data, tokenizer, **{"context": 4, "vocab_size": 97, **options})


def test_documents_are_joined_into_rows() -> None:
    data = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12], [13]]
    assert list(islice(rows_of(data), 3)) == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 3]]


def test_documents_are_told_apart_by_the_eos_where_there_is_no_bos() -> None:
    tokenizer = zoo.tokenizer()  # it adds nothing
    got = list(islice(rows_of(TEXTS, tokenizer), 3))
    assert got == [[3, 4, 5, 2], [6, 7, 2, 8], [9, 10, 11, 12]]


def test_every_row_begins_with_the_bos_that_the_tokenizer_adds() -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_path())
    text = ["The war lasted from 1732 to 1745"] * 3
    ids = tokenizer(text[0])["input_ids"]
    got = list(islice(Rows(text, tokenizer, context=6), 3))
    assert got[0] == ids[:6]
    assert [row[0] for row in got] == [tokenizer.bos_token_id] * 3
    assert got[1][1:] == [*ids[6:], *ids][:5]


def test_without_packing_a_document_is_a_row() -> None:
    data = [[3, 4, 5], [6], [8, 9, 10, 11, 12]]
    got = list(islice(rows_of(data, pack=False), 3))
    assert got == [[3, 4, 5], [8, 9, 10, 11], [3, 4, 5]]  # of one token nothing can be predicted


def test_padding_leading_and_special_positions_are_left_out() -> None:
    ids = padded([[1, 3, 4, 5], [1, 6, 2]], pad=0)
    assert ids.tolist() == [[1, 3, 4, 5], [1, 6, 2, 0]]
    kept = kept_positions(ids, [4, 3], 1, frozenset({0, 1, 2}))
    assert kept.tolist() == [[False, True, True, True], [False, True, False, False]]
    kept = kept_positions(ids, [4, 3], 0, frozenset())
    assert kept.tolist() == [[True] * 4, [True, True, True, False]]


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_a_position_is_found_again(n: int) -> None:
    data = [torch.randint(3, 97, (length,)) for length in (3, 9, 1, 4, 7)]
    one = rows_of(data)
    list(islice(one, n))
    state = one.state()
    rest = list(islice(one, 6))
    other = rows_of(data)
    other.restore(state)
    assert list(islice(other, 6)) == rest
    with pytest.raises(MismatchError, match="not those that were read before"):
        rows_of([*reversed(data)]).restore(rows_after(data, 5))


def rows_after(data: Any, n: int) -> dict[str, Any]:
    rows = rows_of(data)
    list(islice(rows, n))
    return rows.state()


def test_an_iterator_ends_and_a_list_begins_again() -> None:
    data = [[3, 4, 5, 6, 7]]
    assert list(rows_of(iter(data))) == [[3, 4, 5, 6]]
    assert len(list(islice(rows_of(data), 10))) == 10


# -- files and data sets -------------------------------------------------------------------------


def test_a_long_file_is_one_document_read_in_pieces(tmp_path: Path) -> None:
    words = [f"w{3 + i % 90}" for i in range(PIECE // 2)]
    lines = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    (tmp_path / "long.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = rows_of(tmp_path / "long.txt", zoo.tokenizer(), context=50)
    got = [i for row in islice(rows, len(words) // 50) for i in row]
    assert got == [int(word[1:]) for word in words][: len(got)]


def test_the_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "w5 w6"), ("a.txt", "w3 w4"), ("c.md", "w9 w9 w9")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = rows_of(str(tmp_path), zoo.tokenizer(), context=5)
    assert next(rows) == [3, 4, 2, 5, 6]


def test_data_sets_streaming_and_not() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS, "ids": [[3, 4], [5], [6, 7, 8], [9]]})
    for data in (made, made.to_iterable_dataset()):
        assert next(rows_of(data, zoo.tokenizer())) == [3, 4, 5, 2]
        assert next(rows_of(data, text_column="ids")) == [3, 4, 5, 6]
        with pytest.raises(ConfigError, match="no column 'body'; it has text, ids: set text_colum"):
            next(rows_of(data, zoo.tokenizer(), text_column="body"))
        again = rows_of(data, zoo.tokenizer())
        assert len(list(islice(again, 12))) == 12  # it begins again


def test_the_builtin_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_path())
    first = list(islice(Rows("builtin", tokenizer, context=32, seed=3), 4))
    assert first == list(islice(Rows("builtin", tokenizer, context=32, seed=3), 4))
    assert first != list(islice(Rows("builtin", tokenizer, context=32, seed=4), 4))
    assert tokenizer.unk_token_id not in {i for row in first for i in row}


# -- bad data ------------------------------------------------------------------------------------


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"empty.txt is empty"):
        rows_of(tmp_path / "empty.txt", zoo.tokenizer())
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match="is empty: it holds no document"):
        next(rows_of(tmp_path / "blank.txt", zoo.tokenizer()))
    for data in ([], [""], iter([])):
        with pytest.raises(InputError, match="holds no document"):
            next(rows_of(data, zoo.tokenizer()))
    with pytest.raises(InputError, match=r"no file or folder .*missing.txt"):
        rows_of(tmp_path / "missing.txt", zoo.tokenizer())
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder holds no .txt file"):
        rows_of(tmp_path / "folder", zoo.tokenizer())


def test_data_shorter_than_one_context() -> None:
    with pytest.raises(InputError, match=r"only 3 token\(s\), less than one context of 4"):
        next(rows_of([[3, 4, 5]]))
    with pytest.raises(InputError, match="no document of the training data has two tokens"):
        next(rows_of([[3], [4]], pack=False))


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("w3 w4 caf\xe9 w5".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt is not UTF-8 text .*0xe9"):
        next(rows_of(tmp_path / "latin.txt", zoo.tokenizer()))


def test_what_is_no_document() -> None:
    with pytest.raises(InputError, match="cannot read training data from int"):
        rows_of(3)
    with pytest.raises(InputError, match="a text or a list of token ids, got int"):
        next(rows_of([3, 4]))
    with pytest.raises(InputError, match=r"document 2 .* has token id 97, outside the vocabulary"):
        next(rows_of([[3, 4], [97]]))
    with pytest.raises(InputError, match="no tokenizer"):
        next(rows_of(["text"]))

"""Training text: documents from files, ``datasets`` or iterators, packed into rows of token ids.

The position in the data is a small state (documents read, tokens left over, a digest), so that a
run that was killed finds its place again and notices when it is given other data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import ConfigError, InputError, MismatchError

#: A text file is read and tokenised in pieces of about so many characters, cut at a line's end.
PIECE = 1 << 16
#: Sentences of the builtin text per document: six never exceed the builtin model's context.
_BUILTIN_SENTENCES = 6

Document = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class _Continued:
    """A piece of a text file that goes on where the last one ended."""

    text: str


class Rows:
    """Rows of token ids from documents, at a position that can be saved and found again.

    Args:
        data: See ``train``.
        tokenizer: The model's tokenizer; not needed for documents of token ids.
        context: Tokens per row.
        pack: Join documents; else one row per document.
        text_column: Column of a data set that holds the text.
        vocab_size: To check ids against.

    Iterating gives ``(ids,)`` lists, endlessly where the data can be read again from the start;
    a one-shot iterator ends.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        *,
        context: int,
        pack: bool = True,
        text_column: str = "text",
        vocab_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self._open = opener(data, text_column, seed)
        self._again = not isinstance(data, Iterator)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.context, self.pack = context, pack
        special = _special_ids(tokenizer)
        self._bos, self._eos = special
        self._documents = self._open()
        self._read, self._rows_made = 0, 0
        self._pending: list[int] = []
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        while (row := self._row()) is None:
            self._advance()
        self._rows_made += 1
        return row

    def _row(self) -> list[int] | None:
        if not self.pack:
            row, self._pending = self._pending[: self.context], []
            return row if len(row) > 1 else None
        start = [] if self._bos is None or self._pending[:1] == [self._bos] else [self._bos]
        wanted = self.context - len(start)
        if len(self._pending) < wanted:
            return None
        row, self._pending = start + self._pending[:wanted], self._pending[wanted:]
        return row

    def _advance(self) -> None:
        """Read one more document; at the end of the data begin again."""
        try:
            document = next(self._documents)
        except StopIteration:
            self._end_of_data()
            return
        self._read += 1
        self._digest.update(_bytes(document))
        self._pending += self._ids(document)

    def _end_of_data(self) -> None:
        if self._rows_made == 0:
            n = len(self._pending)
            if self._read == 0:
                raise InputError("the training data is empty: it holds no document")
            raise InputError(
                f"the training data has only {n} token(s), less than one context of "
                f"{self.context}: give more text or lower context"
                if self.pack
                else "no document of the training data has two tokens"
            )
        if not self._again:
            raise StopIteration
        self._documents = self._open()

    def _ids(self, document: Document | _Continued) -> list[int]:
        if isinstance(document, str | _Continued):
            if self._tokenizer is None:
                raise InputError("this model has no tokenizer: give the data as token ids")
            new = isinstance(document, str)
            text = document if isinstance(document, str) else document.text
            ids = self._tokenizer(text, add_special_tokens=new, verbose=False)["input_ids"]
            # Without a BOS, documents are told apart by the EOS between them.
            separate = new and self._bos is None and self._eos is not None and self._read > 1
            return [self._eos, *ids] if separate and self.pack else ids  # type: ignore[list-item]
        ids = torch.as_tensor(document, dtype=torch.long).flatten().tolist()
        if (
            self._vocab_size is not None
            and ids
            and not 0 <= min(ids) <= max(ids) < self._vocab_size
        ):
            raise InputError(
                f"document {self._read} of the training data has token id "
                f"{max(ids) if min(ids) >= 0 else min(ids)}, outside the vocabulary (0 to "
                f"{self._vocab_size - 1})"
            )
        return ids

    # -- position --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The position, JSON-ready."""
        return {
            "documents": self._read,
            "rows": self._rows_made,
            "pending": list(self._pending),
            "digest": self._digest.hexdigest(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on to a saved position, which must not lie behind.

        Raises:
            MismatchError: The documents up to there are other ones.
        """
        self._skip(state["documents"])
        if self._digest.hexdigest() != state["digest"]:
            raise MismatchError(_OTHER_DATA.format(n=state["documents"]))
        self._pending, self._rows_made = list(state["pending"]), state["rows"]

    def _skip(self, documents: int) -> None:
        """Read on to so many documents without tokenising them."""
        while self._read < documents:
            document = next(self._documents, None)
            if document is None:
                if not self._again or not self._read:
                    raise MismatchError(_OTHER_DATA.format(n=documents))
                self._documents = self._open()
                continue
            self._read += 1
            self._digest.update(_bytes(document))


_OTHER_DATA = (
    "the first {n} documents of this data are not those that were read before: give "
    "the same data from its beginning, or another output folder"
)


def _special_ids(tokenizer: Any) -> tuple[int | None, int | None]:
    """The BOS that the tokenizer puts in front of a text, if it does; and the EOS."""
    if tokenizer is None:
        return None, None
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    bos = getattr(tokenizer, "bos_token_id", None)
    return (bos if bos is not None and first == [bos] else None), tokenizer.eos_token_id


def _bytes(document: Document | _Continued) -> bytes:
    if isinstance(document, _Continued):
        document = document.text
    if isinstance(document, str):
        return document.encode("utf-8", "surrogatepass") + b"\0"
    return str(torch.as_tensor(document).tolist()).encode()


# -- documents -----------------------------------------------------------------------------------


def opener(data: Any, text_column: str, seed: int) -> Callable[[], Iterator[Any]]:
    """A function that opens the data at its beginning.

    Raises:
        InputError: No such file, no text in it, or nothing that documents can be read from.
    """
    if isinstance(data, str) and data == "builtin":
        return lambda: _builtin(seed)
    if isinstance(data, str | Path):
        files = _text_files(Path(data))
        return lambda: _from_files(files)
    if isinstance(data, Iterator):
        return lambda: _documents(data, text_column)
    if isinstance(data, Iterable):
        return lambda: _documents(iter(data), text_column)
    raise InputError(
        f"cannot read training data from {type(data).__name__}: give 'builtin', a text file or a "
        "folder of them, a data set, or an iterable of texts or token ids"
    )


def _builtin(seed: int) -> Iterator[str]:
    from nnsight_transcoders.builtin.text import BOS, stream

    sentences = stream(seed + 1)
    while True:
        yield BOS.join(next(sentences) for _ in range(_BUILTIN_SENTENCES))


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no .txt file")
    if not any(file.stat().st_size for file in files):
        raise InputError(f"{path} is empty")
    return files


def _from_files(files: Sequence[Path]) -> Iterator[str | _Continued]:
    for file in files:
        new = True
        with file.open(encoding="utf-8") as handle:
            try:
                while lines := handle.readlines(PIECE):
                    text = "".join(lines)
                    if text.strip():
                        yield text if new else _Continued(text)
                        new = False
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file} is not UTF-8 text ({error.reason} 0x{error.object[error.start]:02x}): "
                    "convert it, e.g. with iconv"
                ) from error


def _documents(items: Iterator[Any], text_column: str) -> Iterator[Document]:
    """Texts or token ids, from items that are such or have a column of them."""
    for item in items:
        if isinstance(item, Mapping):
            if text_column not in item:
                raise ConfigError(
                    f"the data set has no column {text_column!r}; it has "
                    f"{', '.join(map(str, item))}: set text_column"
                )
            item = item[text_column]
        if isinstance(item, str):
            if item.strip():
                yield item
        elif isinstance(item, Sequence | Tensor):
            yield item
        else:
            raise InputError(
                f"a document must be a text or a list of token ids, got {type(item).__name__}"
            )

"""The files of an unfinished pass over a corpus: the statistics so far, and the tokens seen.

``state.safetensors`` takes the place of the one before it in one step; the tokens are appended to
``tokens.bin`` and are on the disk before the state says so. What was appended after the last state
is cut off when the pass goes on.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError, InputError, MismatchError
from nnsight_transcoders.hub.staging import write_tensors

from .statistics import FeatureStatistics

STATE, TOKENS = "state.safetensors", "tokens.bin"


class Progress:
    """A pass over a corpus that survives being killed.

    Args:
        folder: Where its files are; made if it is not there.
        record: What the statistics are of: model, transcoders, settings. JSON-ready.
        statistics: Empty ones, which take over what a state holds.

    Attributes:
        starts: Where each context starts in the corpus.

    Raises:
        MismatchError: The folder has a state of something else.
        CheckpointError: Its state is damaged.
    """

    def __init__(
        self, folder: Path, record: Mapping[str, Any], statistics: FeatureStatistics
    ) -> None:
        self._folder, self._record, self._statistics = folder, json.dumps(record), statistics
        self.starts = array("q", [0])
        self._kept = self._load()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKENS).touch()
            os.truncate(folder / TOKENS, 4 * self._kept)
            self._log = (folder / TOKENS).open("ab")
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from error

    def _load(self) -> int:
        """Take over the state, if there is one; returns the number of its tokens."""
        path = self._folder / STATE
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                record = (file.metadata() or {})["record"]
                names = self._statistics.tensors()
                tensors = {name: file.get_tensor(name) for name in names if record == self._record}
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{path} is no state of a pass over a corpus: {error}; delete it to start anew"
            ) from error
        if record != self._record:
            raise MismatchError(
                f"{self._folder} holds an unfinished pass with other settings, another model or "
                "other transcoders: give the same ones, or another folder"
            )
        self._statistics.load(tensors)
        log = self._folder / TOKENS
        if not log.exists() or log.stat().st_size < 4 * self._statistics.n_tokens:
            raise CheckpointError(f"{log} is missing or cut off: delete {self._folder}, start anew")
        return self._statistics.n_tokens

    def seen(self, piece: Tensor) -> bool:
        """Whether the next context belongs to the part that the state has; notes where it starts.

        Raises:
            MismatchError: It should, but is not the same.
        """
        start, end = self.starts[-1], self.starts[-1] + len(piece)
        self.starts.append(end)
        if start >= self._kept:
            return False
        known = torch.from_file(str(self._folder / TOKENS), size=self._kept, dtype=torch.int32)[
            start:end
        ]
        if not torch.equal(known.long(), piece.cpu()):
            raise MismatchError(
                f"the text differs from what was read before, from token {start}: give the same "
                f"text from its beginning, or another folder than {self._folder}"
            )
        return True

    def check_all_seen(self) -> None:
        """Check that the text was not shorter than what the state has.

        Raises:
            MismatchError: It was.
        """
        if self.starts[-1] < self._kept:
            raise MismatchError(
                f"the text ends after {self.starts[-1]} tokens, but {self._kept} were read before: "
                f"give the same text, or another folder than {self._folder}"
            )

    def append(self, pieces: list[Tensor]) -> None:
        """Add the tokens of some contexts."""
        try:
            self._log.write(torch.cat(pieces).to("cpu", torch.int32).numpy().tobytes())
        except OSError as error:
            raise InputError(f"cannot write {self._log.name}: {error.strerror}") from error

    def save(self) -> None:
        """Make everything so far survive."""
        self._sync()
        tensors = self._statistics.tensors()
        write_tensors(self._folder / STATE, tensors, {"record": self._record})

    def _sync(self) -> None:
        try:
            self._log.flush()
            os.fsync(self._log.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._log.name}: {error.strerror}") from error

    def tokens(self) -> Tensor:
        """The corpus ``(n,)`` int32, mapped from its file."""
        self._sync()
        size = self._statistics.n_tokens
        if not size:
            return torch.zeros(0, dtype=torch.int32)
        return torch.from_file(str(self._folder / TOKENS), size=size, dtype=torch.int32)

    def close(self) -> None:
        """Let the file go; what is not saved is lost."""
        self._log.close()

    def remove(self) -> None:
        """Delete the files of a pass that is finished."""
        self.close()
        (self._folder / STATE).unlink(missing_ok=True)
        (self._folder / TOKENS).unlink(missing_ok=True)

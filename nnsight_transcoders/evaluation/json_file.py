"""Results that are kept as JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import InputError


class JsonFile:
    """A result with ``to_dict`` and ``from_dict`` that can be saved and loaded."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        raise TypeError(f"{type(self).__name__} does not say how it is written")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read ``to_dict``'s output."""
        raise TypeError(f"{cls.__name__} does not say how it is read from {type(data).__name__}")

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; ``load`` reads it back."""
        path = Path(path)
        with atomic_path(path) as partial:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            InputError: No such file, or not of that kind.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"{path} holds no stored {cls.__name__}")
        return cls.from_dict(data)

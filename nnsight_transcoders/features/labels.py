"""Labels of features: read from other people's files, edited by hand, written.

Read are Neuronpedia's explanations as JSON or JSON lines (records with ``layer``, ``index``,
``description``; exports have them gzipped), plain JSON objects (``{"8_355": "years"}``) and CSV.
The files that are written are such records too. A label is text and nothing else: whatever it
contains, the pages show it as text.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import InputError

from .report import Label

Key = tuple[int, int]

#: Names of columns in other people's files, the first that is there counts.
_TEXT = ("description", "label", "explanation", "text")
_INDEX = ("index", "feature")
_SOURCE = ("explanationModelName", "source")


class FeatureLabels(MutableMapping[Key, Label]):
    """Labels by ``(layer, feature)``; a plain text can be assigned as well.

    Args:
        labels: To begin with.
        path: Where ``save`` writes if it is given no path.
    """

    def __init__(
        self, labels: Mapping[Key, Label | str] | None = None, path: str | Path | None = None
    ) -> None:
        self._labels: dict[Key, Label] = {}
        self._path = None if path is None else Path(path)
        for key, label in (labels or {}).items():
            self[key] = label

    def __getitem__(self, key: Key) -> Label:
        return self._labels[key]

    def __setitem__(self, key: Key, label: Label | str) -> None:
        layer, index = key
        if layer < 0 or index < 0:
            raise InputError(f"a label's key is (layer, feature), got {key}")
        label = Label(label) if isinstance(label, str) else label
        if not label.text.strip():
            raise InputError(f"the label of feature {index} of layer {layer} is empty")
        self._labels[int(layer), int(index)] = label

    def __delitem__(self, key: Key) -> None:
        del self._labels[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(sorted(self._labels))

    def __len__(self) -> int:
        return len(self._labels)

    def __repr__(self) -> str:
        return f"FeatureLabels({len(self)} labels)"

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: str | Path, *, missing_ok: bool = False) -> FeatureLabels:
        """Read ``.json``, ``.jsonl`` or ``.csv``, each also with ``.gz`` behind.

        Args:
            path: The file.
            missing_ok: No file gives no labels.

        Raises:
            InputError: No such file, or something in it is no label.
        """
        path = Path(path)
        labels = cls(path=path)
        if missing_ok and not path.exists():
            return labels
        for where, record in _records(path):
            for key, label in _read(record, f"{path}, {where}"):
                labels[key] = label
        return labels

    def save(self, path: str | Path | None = None) -> Path:
        """Write ``.json``, ``.jsonl`` or ``.csv``, which ``read`` reads.

        Args:
            path: Where (default: where they were read from).

        Raises:
            InputError: No path, or it cannot be written.
        """
        chosen = self._path if path is None else Path(path)
        if chosen is None:
            raise InputError("these labels come from no file: say where to save them")
        records = [_record(key, self[key]) for key in self]
        if chosen.suffix == ".csv":
            text = _csv_text(records)
        elif chosen.suffix == ".jsonl":
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
        with atomic_path(chosen) as partial:
            partial.write_text(text, encoding="utf-8", errors="replace")
        return chosen

    def details(self, others: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """The labels as ``graph.to_html(feature_details=...)`` takes them.

        Args:
            others: What is known besides (``feature_details``); labels are put into a copy of it.
        """
        found = {name: dict(known) for name, known in (others or {}).items()}
        for (layer, index), label in self.items():
            found.setdefault(f"{layer}_{index}", {})["label"] = label.text
        return found


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record is, and the record."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read labels from {path}: {error}") from error
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    elif kind == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"line {number}", _parsed(line, path)
    elif kind == ".json":
        yield from _json_records(_parsed(text, path))
    else:
        raise InputError(
            f"labels are read from .json, .jsonl or .csv (or .gz of these), not {path}"
        )


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _json_records(data: Any) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or an object from names to texts."""
    if isinstance(data, dict) and not _first(data, _INDEX) and "explanations" not in data:
        for name, text in data.items():
            layer, _, index = name.partition("_")
            yield f"key {name!r}", {"layer": layer, "index": index, "description": text}
        return
    records = data if isinstance(data, list) else [data]
    yield from ((f"record {number}", record) for number, record in enumerate(records, 1))


def _read(record: Any, where: str) -> Iterator[tuple[Key, Label]]:
    """The labels of one record; Neuronpedia's features have a list of them, the first counts."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: a label is a record with layer, index and description")
    explanations = record.get("explanations")
    inner = record
    if isinstance(explanations, list) and _first(record, _TEXT) is None:
        if not explanations:
            return
        inner = explanations[0] if isinstance(explanations[0], Mapping) else {}
        record = {**inner, **record}
    text = _first(inner, _TEXT)
    if text is None and any(name in inner for name in _TEXT):
        return  # an empty cell: not labelled yet
    if not isinstance(text, str):
        raise InputError(f"{where}: no {' or '.join(_TEXT)}")
    key = (
        _number(record.get("layer"), "layer", where),
        _number(_first(record, _INDEX), "index", where),
    )
    source = _first(inner, _SOURCE)
    yield key, Label(text.strip(), source if isinstance(source, str) else "", _scores(inner))


def _first(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _number(value: Any, name: str, where: str) -> int:
    """A number, or the one that a Neuronpedia layer such as ``"6-transcoder-hp"`` begins with."""
    found = re.match(r"\d{1,9}(?![\d.])", str(value).strip(), re.ASCII)
    if found is None or (name == "index" and not str(value).strip().isdigit()):
        raise InputError(f"{where}: {name} is {value!r}, which is no number")
    return int(found[0])


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    """Scores as an object of numbers; anything else is left out."""
    scores = record.get("scores")
    if isinstance(scores, str):
        try:
            scores = json.loads(scores)
        except ValueError:
            scores = None
    if not isinstance(scores, Mapping):
        return {}
    return {str(k): float(v) for k, v in scores.items() if isinstance(v, int | float)}


def _record(key: Key, label: Label) -> dict[str, Any]:
    record: dict[str, Any] = {
        "layer": str(key[0]),
        "index": str(key[1]),
        "description": label.text,
        "explanationModelName": label.source,
    }
    return record | ({"scores": dict(label.scores)} if label.scores else {})


def _csv_text(records: list[dict[str, Any]]) -> str:
    out = io.StringIO(newline="")
    names = ("layer", "index", "description", "explanationModelName", "scores")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        scores = json.dumps(record["scores"]) if "scores" in record else ""
        writer.writerow([*(record[name] for name in names[:-1]), scores])
    return out.getvalue()

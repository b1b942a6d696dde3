"""The files of a feature bundle.

A bundle is a folder:

``bundle.json``           what it is of: model, transcoders, layers and widths, settings, sizes
``features.safetensors``  the tables below
``labels.json``           labels, if there are any (``labels.py``); may be edited by hand

Tables have one row per feature, all layers counted through, so that one feature is a few contiguous
reads. Texts are kept once: examples name places in ``tokens``, and ids are looked up in the
vocabulary.

============================  ======================  ============================================
``count total maximum``       ``(F,)``                active positions; sum, largest activation
``exponent histogram``        ``(F,) (F, n_bins)``    equal bins over ``[0, 2^exponent)``
``top.value .peak``           ``(F, K)``              largest activation of a context; its place
``top.window``                ``(F, K, W)``           activations around it, as shares of it
``top.seen``                  ``(F, K)``              how often the window's tokens are in the text
``band.value .peak .window``  ``(F, n_bands, ...)``   the same of the samples in bands
``coactive.index .overlap``   ``(F, M)``              -1 where there are fewer
``top_logits.token .value``   ``(F, M)``              and ``bottom_logits``, ``de_embedding``
``reference.start .length``   ``(R,)``                windows of the corpus
``in_reference``              ``(F, n_reference)``    whether a feature is active in them
``tokens context_start``      ``(n,) (n_ctx + 1,)``   the corpus
``vocabulary.bytes .start``   ``(bytes,) (V + 1,)``   UTF-8 texts of all ids
============================  ======================  ============================================
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.hub.staging import write_json, write_tensors

from .coactive import coactive_features
from .statistics import SUMS, FeatureStatistics, StatisticsConfig
from .windows import window_counts

INDEX, TABLES, LABELS = "bundle.json", "features.safetensors", "labels.json"
FORMAT, VERSION = "nnsight-transcoders features", 1


@dataclass(frozen=True)
class Contents:
    """What a pass found.

    Attributes:
        record: What it was a pass over; its ``"layers"`` are layer -> number of features.
        statistics: Of all features.
        tokens: The corpus ``(n,)`` int32.
        starts: Where each context starts, and the end.
    """

    record: Mapping[str, Any]
    statistics: FeatureStatistics
    tokens: Tensor
    starts: array[int]


def write_bundle(
    folder: Path,
    contents: Contents,
    vocabulary: Sequence[str],
    lists: Mapping[str, Tensor],
    n_coactive: int,
    *,
    verbose: bool = False,
) -> None:
    """Write a bundle; the folder is one as soon as ``bundle.json``, written last, is there.

    Args:
        folder: Where.
        contents: What the pass found; its tables are put in order.
        vocabulary: Text of each token id.
        lists: Logit effects and de-embeddings (``vocabulary.token_lists``), or nothing.
        n_coactive: Co-active features listed.
        verbose: Show progress.

    Raises:
        InputError: The folder cannot be written.
    """
    statistics = contents.statistics
    statistics.finish()
    index, overlap = coactive_features(statistics.sketch.keys, n_coactive, verbose=verbose)
    starts = torch.tensor(contents.starts, dtype=torch.int64)
    tensors = {
        **_tables(statistics),
        "top.seen": _seen(statistics, contents.tokens, starts),
        "coactive.index": index,
        "coactive.overlap": overlap,
        **lists,
        "tokens": contents.tokens,
        "context_start": starts,
        **_vocabulary(vocabulary),
    }
    # One entry: the order of several is not fixed, and the same pass is to give the same bytes.
    write_tensors(folder / TABLES, tensors, {"format": f"{FORMAT} {VERSION}"})
    about = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": __version__,
        **contents.record,
        "n_tokens": statistics.n_tokens,
        "n_positions": statistics.n_positions,
        "n_contexts": len(contents.starts) - 1,
    }
    with atomic_path(folder / INDEX) as partial:
        write_json(partial, about)


def _tables(statistics: FeatureStatistics) -> dict[str, Tensor]:
    tables = {name: getattr(statistics, name) for name in SUMS}
    tables["top.value"], tables["top.peak"] = statistics.top_entries()
    tables["top.window"] = statistics.top.payload["window"]
    shape = (statistics.n_features, statistics.config.n_bands)
    for name, held in statistics.bands.payload.items():
        tables[f"band.{name}"] = held.unflatten(0, shape)
    reference = statistics.reference
    tables["reference.start"], tables["reference.length"] = reference.start, reference.length
    tables["in_reference"] = reference.active
    return tables


def _seen(statistics: FeatureStatistics, tokens: Tensor, starts: Tensor) -> Tensor:
    """How often the window of each top example stands in the corpus: ``(F, K)``."""
    used = statistics.top.keys >= 0
    digests = statistics.top.payload["digest"][used]
    seen = torch.zeros(used.shape, dtype=torch.int32)
    config = statistics.config
    seen[used] = window_counts(tokens, starts, digests, config.before, config.window)
    return seen


def _vocabulary(texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = [text.encode("utf-8", "replace") for text in texts]
    sizes = torch.tensor([0, *map(len, encoded)], dtype=torch.int64)
    joined = torch.tensor(bytearray(b"".join(encoded)), dtype=torch.uint8)
    return {"vocabulary.bytes": joined, "vocabulary.start": sizes.cumsum(0)}


def read_index(folder: Path) -> dict[str, Any]:
    """``bundle.json``.

    Raises:
        CheckpointError: It is missing, damaged or of another version.
    """
    path = folder / INDEX
    if not path.exists():
        hint = "an interrupted pass: call collect_features again" if folder.is_dir() else "missing"
        raise CheckpointError(f"{folder} is no feature bundle, it has no {INDEX} ({hint})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a feature bundle")
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {data.get('version')}; this package reads version {VERSION}"
        )
    missing = {"model", "layers", "statistics", "n_tokens", "n_positions"} - data.keys()
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}: collect again")
    try:
        widths = {int(layer): int(n) for layer, n in data["layers"].items()}
        StatisticsConfig(**data["statistics"])
    except (TypeError, ValueError, AttributeError, InputError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; collect again") from error
    return {**data, "layers": {str(layer): n for layer, n in widths.items()}}

"""Feature files for circuit-tracer's page, from a feature bundle.

Two forms. *Loose*: one ``{number}.json`` per feature, its number Cantor's pairing of layer and
feature, served next to the graph or at any ``https://`` address. *Packed*, as on the Hub below a
set's ``features/``: per layer one ``.bin`` with a record for each feature (four bytes of length,
little-endian, then zlib-compressed JSON), and ``index.json.gz`` with each layer's file name and the
records' offsets.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import InputError

from .names import cantor, defused
from .write_json import write_json

if TYPE_CHECKING:
    from nnsight_transcoders.circuits.graph import AttributionGraph
    from nnsight_transcoders.features.bundle import FeatureBundle
    from nnsight_transcoders.features.report import FeatureReport, Histogram

#: How many quantiles of its activations a feature's record has; the page shows them as percents.
N_QUANTILES = 100


def feature_json(report: FeatureReport, transcoder_id: str = "") -> dict[str, Any]:
    """One feature's record.

    Args:
        report: The feature, ``bundle[layer, index]``.
        transcoder_id: What the record says it is of.
    """
    return {
        "transcoder_id": transcoder_id,
        "index": report.index,
        "examples_quantiles": [
            {
                "quantile_name": group.name,
                "examples": [
                    {
                        "tokens": [defused(token) for token in example.tokens],
                        "tokens_acts_list": list(example.activations),
                        "train_token_ind": example.peak,
                        "is_repeated_datapoint": False,
                    }
                    for example in group.examples
                ],
            }
            for group in report.groups
        ],
        "top_logits": [defused(token) for token, _ in report.top_logits],
        "bottom_logits": [defused(token) for token, _ in report.bottom_logits],
        "act_min": 0.0,
        "act_max": report.max_activation,
        "quantile_values": _quantiles(report.histogram),
        "histogram": [float(count) for count in report.histogram.counts],
        "activation_frequency": report.density,
    }


def write_feature_files(
    bundle: FeatureBundle,
    folder: str | Path,
    features: AttributionGraph | Iterable[tuple[int, int]],
) -> list[Path]:
    """Write the loose form.

    Args:
        bundle: The features' examples and statistics.
        folder: Where to; for circuit-tracer's local page a folder below the one it serves, whose
            address is then the graph's ``scan``, such as ``"./data/features"``.
        features: Which ones: ``(layer, feature)`` pairs, or a graph's.

    Returns:
        The files.

    Raises:
        InputError: A feature that the bundle does not have.
    """
    folder = Path(folder)
    return [
        write_json(
            feature_json(bundle[layer, index], f"layer_{layer}"),
            folder / f"{cantor(layer, index)}.json",
        )
        for layer, index in _pairs(features)
    ]


def write_packed_features(
    bundle: FeatureBundle, folder: str | Path, layers: Sequence[int] | None = None
) -> Path:
    """Write the packed form: every feature of some layers (default: all of the bundle's).

    Returns:
        ``index.json.gz``.

    Raises:
        InputError: A layer that the bundle does not have.
    """
    folder, chosen = Path(folder), sorted(bundle.layers if layers is None else set(layers))
    missing = [layer for layer in chosen if layer not in bundle.layers]
    if missing or not chosen:
        raise InputError(f"the bundle has layers {list(bundle.layers)}, not {missing}")
    # The page looks a layer up by its place in the list.
    index: list[dict[str, Any]] = [{"filename": "", "offsets": []} for _ in range(max(chosen) + 1)]
    for layer in chosen:
        name = f"layer_{layer}.bin"
        offsets = [0]
        with atomic_path(folder / name) as partial, partial.open("wb") as file:
            for number in range(bundle.n_features(layer)):
                record = feature_json(bundle[layer, number], f"layer_{layer}")
                offsets.append(offsets[-1] + file.write(packed_record(record)))
        index[layer] = {"filename": name, "offsets": offsets}
    path = folder / "index.json.gz"
    with atomic_path(path) as partial:
        partial.write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
    return path


def packed_record(record: dict[str, Any]) -> bytes:
    """A record of the packed form."""
    data = zlib.compress(json.dumps(record, allow_nan=False).encode())
    return len(data).to_bytes(4, "little") + data


def _pairs(features: Any) -> list[tuple[int, int]]:
    """Each feature once, in order."""
    if hasattr(features, "of_kind"):
        numbers = features.of_kind("feature")
        features = zip(
            features.layer[numbers].tolist(), features.index[numbers].tolist(), strict=True
        )
    return sorted(set(features))


def _quantiles(histogram: Histogram) -> list[float]:
    """Upper edges of the bins in which each percent of the activations lies."""
    reached = list(itertools.accumulate(histogram.counts))
    if not reached or not reached[-1]:
        return []
    found, i = [], 0
    for percent in range(1, N_QUANTILES + 1):
        while reached[i] * N_QUANTILES < percent * reached[-1]:
            i += 1
        found.append((i + 1) * histogram.width)
    return found

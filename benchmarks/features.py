"""Memory and time of feature statistics at real sizes, on synthetic activations.

    python benchmarks/features.py [--features 100000] [--tokens 1000000] [--active 50]

Draws sparse activations (density falls with the feature's number, some features are correlated in
pairs) in batches of 64 contexts of 128 tokens, feeds them to ``FeatureStatistics``, saves the state
once on the way, writes the bundle, and reads single features from it. Each step runs in a process
of its own; memory is that process' peak resident set, imports of torch included (about 0.25 GB).

Times on a shared machine say little, so that of the pass comes as a ratio too: to the time that a
bare count and sum per feature of the same entries take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nnsight_transcoders.features.bundle import FeatureBundle
from nnsight_transcoders.features.bundle_files import TABLES, Contents, write_bundle
from nnsight_transcoders.features.entries import SparseActivations
from nnsight_transcoders.features.progress import Progress
from nnsight_transcoders.features.statistics import FeatureStatistics

CONTEXT, BATCH = 128, 64
LIMIT_GB = 2.0


def batches(n_features: int, n_tokens: int, n_active: int) -> Iterator[SparseActivations]:
    """Synthetic activations, one batch at a time."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(max(1, n_tokens // (CONTEXT * BATCH))):
        rows = torch.arange(CONTEXT * BATCH).repeat_interleave(n_active)
        feature = (torch.rand(len(rows), generator=draw) ** 2 * n_features).long()
        twin = torch.rand(len(rows), generator=draw) < 0.3
        feature[1:] = torch.where(twin[1:], feature[:-1] ^ 1, feature[1:]).clamp_max(n_features - 1)
        code = torch.unique(rows * n_features + feature)
        rows, feature = code // n_features, code % n_features
        value = (0.01 - (1 - torch.rand(len(rows), generator=draw)).log()) * (1 + feature % 7)
        yield SparseActivations(rows // CONTEXT, rows % CONTEXT, feature, value)


def peak_gb() -> float:
    """Peak resident set of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def collect(folder: Path, size: tuple[int, int, int]) -> dict[str, Any]:
    """The pass, one state on the way, and the bundle."""
    statistics = FeatureStatistics(size[0])
    record = {"model": "synthetic", "transcoders": {}, "layers": {"0": size[0]}}
    record["statistics"] = vars(statistics.config)
    progress = Progress(folder, record, statistics)
    pass_, bare, entries = 0.0, 0.0, 0
    count, total = torch.zeros(size[0]), torch.zeros(size[0], dtype=torch.float64)
    for number, active in enumerate(batches(*size)):
        contexts = list(torch.randint(CONTEXT, (BATCH, CONTEXT)))
        start = time.perf_counter()
        count.index_add_(0, active.feature, torch.ones_like(active.value))
        total.index_add_(0, active.feature, active.value.double())
        middle = time.perf_counter()
        statistics.add(contexts, active)
        end = time.perf_counter()
        bare, pass_, entries = (
            bare + middle - start,
            pass_ + end - middle,
            entries + len(active.value),
        )
        progress.append(contexts)
        if number == 10:
            progress.save()
    passed = peak_gb()
    starts = array("q", range(0, statistics.n_tokens + 1, CONTEXT))
    start = time.perf_counter()
    contents = Contents(record, statistics, progress.tokens(), starts)
    write_bundle(folder, contents, [f"t{i}" for i in range(CONTEXT)], {}, n_coactive=10)
    progress.remove()
    return {
        "tokens": statistics.n_tokens,
        "entries": entries,
        "pass_seconds": pass_,
        "pass_over_bare_count": pass_ / bare,
        "write_seconds": time.perf_counter() - start,
        "pass_peak_gb": passed,
        "peak_gb": peak_gb(),
        "bundle_gb": (folder / TABLES).stat().st_size / 1e9,
    }


def read(folder: Path, size: tuple[int, int, int]) -> dict[str, Any]:
    """Some features, one by one."""
    before, start = peak_gb(), time.perf_counter()
    bundle = FeatureBundle.open(folder)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    for feature in range(0, size[0], size[0] // 20):
        assert sum(bundle[0, feature].histogram.counts) == bundle[0, feature].n_active
    one = (time.perf_counter() - start) / 40
    rise = peak_gb() - before
    return {"open_seconds": opened, "feature_seconds": one, "read_rise_gb": rise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--active", type=int, default=50, help="active features per token")
    parser.add_argument("--step", choices=("collect", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.features, options.tokens, options.active)
    torch.set_num_threads(1)
    if options.step:
        found = {"collect": collect, "read": read}[options.step](options.folder, size)
        print(json.dumps(found))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        for step in ("collect", "read"):
            command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--folder", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found |= json.loads(done.stdout.splitlines()[-1])
    for name, value in found.items():
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:24} {text}")  # noqa: T201
    assert found["peak_gb"] < LIMIT_GB, f"peak memory {found['peak_gb']:.2f} GB"


if __name__ == "__main__":
    main()

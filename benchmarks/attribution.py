"""Time and memory of ``attribute`` on models of known shapes, against what they must at least cost.

    python benchmarks/attribution.py [--shape gpt2|smollm2] [--quick] [--threads N]

Random weights do for speed. Every figure is a ratio measured inside one run, since absolute times
on a shared machine say little: the edge phase is compared with the time that its unavoidable
floating-point operations take at the rate of a plain large ``torch.matmul``, measured around it.
Times are processor times of one thread (``--threads`` for more, on an idle machine), so that other
load on the machine hardly counts.

The least operations that we know (docs/scaling.md): a target at layer l and position t, with
s = t + 1 positions up to its own, crosses the attention of layers l, ..., 0 (sequential blocks).

    layer l        4 D HE + 2 s H D             it stands at one position: one product per head
    l - 1, ..., 1  2 s D (HE + KE) + s^2 HE     output and value maps, the pattern's lower half
    layer 0        s^2 D                        the tokens are taken through it once for all
    sources        2 D                          each at a lower layer and no later position
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.active import active_features
from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.circuits.edges import MEMORY_BUDGET, ROWS_PER_BATCH
from nnsight_transcoders.circuits.engine import OperatorEngine
from nnsight_transcoders.circuits.expand import expand
from nnsight_transcoders.circuits.targets import choose_targets
from nnsight_transcoders.sites import resolve_sites

SHAPES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=5000, n_positions=1024),
    "smollm2": lambda: transformers.LlamaConfig(
        vocab_size=5000,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=2048,
    ),
}


@dataclass
class Case:
    """One prepared problem."""

    label: str
    engine: OperatorEngine
    candidates: Candidates
    phases: dict[str, float]


class TensorMemory(TorchDispatchMode):
    """The most bytes of tensor storage, made inside the block, that are alive at one time.

    Counted tensor by tensor: the process's resident memory also shows what the allocator keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key and key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    @property
    def megabytes(self) -> float:
        """The peak."""
        return self.peak / 2**20


def matmul_rate(size: int = 1536, repeats: int = 3) -> float:
    """Floating-point operations per second of one large float32 product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        torch.matmul(a, b)
        times.append(time.process_time() - start)
    return 2 * size**3 / statistics.median(times)


@contextmanager
def phase(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    phases[name] = time.process_time() - start


def prepare(model: Any, n_positions: int, k: int, d_transcoder: int) -> Case:
    """Collect a run and find its features: k at each layer and position."""
    sites = resolve_sites(model)
    ids = torch.randint(
        0, sites.vocab_size, (n_positions,), generator=torch.Generator().manual_seed(0)
    )
    phases: dict[str, float] = {}
    with phase(phases, "collect"):
        run = collect(model, sites, ids)
    transcoders = random_transcoders(
        run, "per-layer", d_transcoder=d_transcoder, activation="topk", k=k, relu_first=False
    )
    with phase(phases, "freeze"):
        engine = OperatorEngine(model._module, sites, run, transcoders)
    with phase(phases, "features"):
        active = active_features(run, transcoders, engine.inputs, engine.dtype)
    chosen = choose_targets(model, model._module, sites, run, engine.final[-1], None, 10, 0.95)
    candidates = Candidates.build(run, active, chosen, n_positions - 1, engine)
    label = f"T={n_positions} targets={candidates.n_features} d_transcoder={d_transcoder}"
    return Case(label, engine, candidates, phases)


def least_operations(case: Case) -> float:
    """Floating-point operations that the edges need at least."""
    attention = case.engine.frozen.layers[0].attention
    width_o, width_v = attention.W_O.shape[1], attention.W_V.shape[0]
    d_model = attention.W_O.shape[0]
    candidates = case.candidates
    n_heads = attention.pattern.shape[0]
    layer = torch.cat([candidates.layer, candidates.logit_targets().layer - 1]).double()
    reach = torch.cat([candidates.positions, candidates.logit_targets().position]).double() + 1
    pairs = reach * (reach + 1) / 2
    first = 4 * d_model * width_o + 2 * reach * n_heads * d_model
    full = reach * 2 * d_model * (width_o + width_v) + pairs * 2 * width_o
    tokens = torch.minimum(pairs * 2 * d_model, full + reach * 2 * d_model)
    above = first + (layer - 1) * full + tokens
    crossings = torch.where(layer > 0, above, reach * 2 * d_model)
    sources_below = 0.0
    for n, (at, until) in enumerate(zip(layer.tolist(), reach.tolist(), strict=True)):
        own = at if n < candidates.n_features else at + 1
        below = (candidates.layer < own) & (candidates.positions < until)
        sources_below += float(below.sum()) + own * until
    return float(crossings.sum() + 2 * d_model * sources_below)


def matmul_share(case: Case) -> float:
    """Share of the edge phase's CPU time inside matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expand(case.candidates, case.engine, 10**6, MEMORY_BUDGET, verbose=False)
    rows = profile.key_averages()
    total = sum(row.self_cpu_time_total for row in rows)
    products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm")
    return sum(row.self_cpu_time_total for row in rows if row.key in products) / total


def measure(case: Case, repeats: int) -> dict[str, float]:
    """The edge phase against the least time for its operations, alternating."""
    operations, ratios, seconds = least_operations(case), [], []
    for _ in range(repeats):
        before = matmul_rate()
        start = time.process_time()
        expand(case.candidates, case.engine, 10**6, MEMORY_BUDGET, verbose=False)
        seconds.append(time.process_time() - start)
        rate = (before + matmul_rate()) / 2
        ratios.append(seconds[-1] / (operations / rate))
    with TensorMemory() as memory:
        expand(case.candidates, case.engine, 10**6, MEMORY_BUDGET, verbose=False)
    rows = (case.candidates.n_features + 10) * case.candidates.n_columns * 4 / 2**20
    residual = ROWS_PER_BATCH * case.candidates.chosen.direction.shape[1] * 4 / 2**20
    return {
        "CPU seconds": statistics.median(seconds),
        "CPU ms per target": 1000 * statistics.median(seconds) / case.candidates.n_features,
        "x least": statistics.median(ratios),
        "matmul share": matmul_share(case),
        "peak MB": memory.megabytes,
        "of it the edge matrix": rows,
        "batch x T x d_model": residual,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    module = transformers.AutoModelForCausalLM.from_config(
        SHAPES[arguments.shape](), attn_implementation="eager"
    ).eval()
    model = nnsight.NNsight(module)
    cases = [(32, k, 4096) for k in (1, 2, 4, 6)]
    cases += [(16, 4, 4096), (64, 1, 4096), (128, 1, 4096), (32, 2, 1024), (32, 2, 16384)]
    if arguments.quick:
        cases = [(16, 1, 1024)]
    for n_positions, k, d_transcoder in cases:
        case = prepare(model, n_positions, k, d_transcoder)
        found = measure(case, arguments.repeats)
        others = "  ".join(f"{name} {value:.2f}s" for name, value in case.phases.items())
        figures = "  ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(f"{arguments.shape} {case.label}: {figures}  ({others})", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

"""Our training step beside ``eai-sparsify``'s, on the same sizes, alternating on one machine.

    make .venv-peers/eai-sparsify/.installed      # its own environment, once
    python benchmarks/training.py
    python benchmarks/training.py --d-model 576 --width 9216 --k 32 --batch 1024

Three steps, each forward, backward and one fused Adam update of a TopK skip transcoder in float32
with one thread: ``ours``, the trainer's step, whose decoder and gradients go through active
features only; ``dense``, our ``Transcoder`` module in a plain loop, with a dense decoder;
``sparsify``, its ``SparseCoder``. Every worker is a process that lives through the run; they take
turns, and a ratio is that of the median CPU time per token. Memory is each process' peak resident
set, imports included, and the same less what the process had before its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = Path(os.environ.get("PEERS", Path(__file__).parents[1] / ".venv-peers"))
PEER = PEERS / "eai-sparsify" / "bin" / "python"
KINDS = ("ours", "dense", "sparsify")

Step = Callable[[Any, Any], float]


# -- in the workers ------------------------------------------------------------------------------


def our_step(a: argparse.Namespace) -> Step:
    import torch

    from nnsight_transcoders.training.config import TrainConfig
    from nnsight_transcoders.training.group import Group
    from nnsight_transcoders.training.init import (
        initialise,
        make_part,
        measure_units,
        transcoder_config,
    )
    from nnsight_transcoders.training.processes import Processes
    from nnsight_transcoders.training.step import Learner

    config = TrainConfig(
        d_transcoder=a.width,
        k=a.k,
        skip=True,
        n_tokens=a.batch * 10_000,
        batch_size=a.batch,
        aux_weight=0.0,
        clip_norm=None,
        lr=1e-3,
    )
    part = make_part(transcoder_config(config, 0, a.d_model, None), (0,), 0.0)
    x, y = draw(a)
    initialise(part, config, x, y, torch.Generator().manual_seed(0))
    learner = Learner(Group({0: part}, config, measure_units({0: (x, y)})), config, Processes())
    return lambda x, y: learner.step({0: (x, y)}, 1000).loss


def dense_step(a: argparse.Namespace) -> Step:
    import torch

    from nnsight_transcoders import Transcoder, TranscoderConfig

    module = Transcoder(
        TranscoderConfig(
            a.d_model, a.d_model, a.width, activation="topk", k=a.k, skip=True, dtype="float32"
        )
    )
    with torch.no_grad():
        module.W_enc.copy_(torch.nn.functional.normalize(torch.randn(module.W_enc.shape), dim=1))
    return plain_step(module, lambda x, y: (y - module(x)).square().sum())


def their_step(a: argparse.Namespace) -> Step:
    from sparsify.config import SparseCoderConfig  # type: ignore[import-not-found]
    from sparsify.sparse_coder import SparseCoder  # type: ignore[import-not-found]

    config = SparseCoderConfig(num_latents=a.width, k=a.k, transcode=True, skip_connection=True)
    module = SparseCoder(a.d_model, config)
    return plain_step(module, lambda x, y: module(x, y).fvu)


def plain_step(module: Any, loss_of: Callable[[Any, Any], Any]) -> Step:
    import torch

    module.requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def step(x: Any, y: Any) -> float:
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def draw(a: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    return torch.randn(a.batch, a.d_model), torch.randn(a.batch, a.d_model)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(a: argparse.Namespace) -> None:
    """Answer every line of stdin with the CPU seconds of ``--steps`` steps, and the peak memory."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = {"ours": our_step, "dense": dense_step, "sparsify": their_step}[a.worker]
    step = make(a)
    before = peak_mb()
    x, y = draw(a)
    for _ in sys.stdin:
        start = time.process_time()
        for _ in range(a.steps):
            step(x, y)
        spent = time.process_time() - start
        answer = {"seconds": spent, "peak": peak_mb(), "more": peak_mb() - before}
        sys.stdout.write(f"\n@{json.dumps(answer)}\n")
        sys.stdout.flush()


# -- the run -------------------------------------------------------------------------------------


class Worker:
    """A process that steps when it is told to."""

    def __init__(self, kind: str, a: argparse.Namespace) -> None:
        sizes = [f"--{n}={getattr(a, n.replace('-', '_'))}" for n in SIZES]
        python = str(PEER) if kind == "sparsify" else sys.executable
        self._process = subprocess.Popen(
            [python, __file__, "--worker", kind, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def turn(self) -> dict[str, float]:
        """One turn's seconds and memory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"a worker ended: {self._process.args}")

    def end(self) -> None:
        self._process.communicate()


SIZES = ("d-model", "width", "k", "batch", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description="Our training step beside eai-sparsify's.")
    for name, default in zip(SIZES, (576, 4608, 32, 1024, 4), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        work(a)
        return
    if not PEER.exists():
        raise SystemExit(f"no {PEER}: make {PEER.parents[1]}/.installed")
    workers = {kind: Worker(kind, a) for kind in KINDS}
    turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(a.rounds + 1):
        for kind in KINDS:
            turn = workers[kind].turn()
            if number:  # the first one warms up
                turns[kind].append(turn)
    for worker in workers.values():
        worker.end()
    report(turns, a)


def report(turns: dict[str, list[dict[str, float]]], a: argparse.Namespace) -> None:
    """Tokens per CPU second, and ratios to sparsify."""
    print(f"d_model {a.d_model}, width {a.width}, k {a.k}, batch {a.batch}, float32, one thread")  # noqa: T201
    seconds = {kind: statistics.median(t["seconds"] for t in turns[kind]) for kind in KINDS}
    for kind in KINDS:
        last = turns[kind][-1]
        speed = seconds["sparsify"] / seconds[kind]
        memory = last["peak"] / turns["sparsify"][-1]["peak"]
        more = last["more"] / turns["sparsify"][-1]["more"]
        print(  # noqa: T201
            f"{kind:9} {a.batch * a.steps / seconds[kind]:8.0f} tokens per CPU second, "
            f"{speed:5.2f} x sparsify's speed; peak {last['peak']:6.0f} MB ({memory:.2f} x), "
            f"of it in steps {last['more']:6.0f} MB ({more:.2f} x)"
        )


if __name__ == "__main__":
    main()

"""Time of one target's contributions, and of one feature's connections, on GPT-2 small's shapes.

    python benchmarks/paths.py [--quick] [--repeats N] [--threads N]

Random weights do for speed. Times are processor times; since these still depend on what else the
machine does, each stands beside that of the plain products which the result needs at least, done in
the same minute: for contributions the value and output projections of every layer, for connections
one matrix-vector product per layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import nnsight
import torch
import transformers

from nnsight_transcoders import CircuitRun, TranscoderSet, top_connections
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.sites import resolve_sites


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def against(name: str, work: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> None:
    """Print the medians of some work and of the plain products, measured in turn."""
    found, least = [], []
    for _ in range(repeats):
        least.append(cpu_seconds(plain))
        found.append(cpu_seconds(work))
    seconds, floor = statistics.median(found), statistics.median(least)
    print(  # noqa: T201
        f"{name}: CPU {seconds:.3f} s, plain products {floor:.3f} s, ratio {seconds / floor:.1f}",
        flush=True,
    )


def contributions(circuit: CircuitRun, repeats: int) -> None:
    """All components' contributions to one feature of the last layer at the last position."""
    layer = max(circuit.active.layers)
    active = circuit.active.layers[layer]
    target = circuit.feature(layer, int(active.index[-1]), int(active.position[-1]))
    count = len(circuit.contributions(target))
    resid = circuit.run.resid

    def plain() -> None:
        for block, x in zip(circuit.frozen.layers, resid, strict=True):
            torch.matmul(x, block.attention.W_V.T)
            torch.matmul(target.vector, block.attention.W_O)

    name = f"contributions of {count} components to one feature, T={len(resid[0])}"
    against(name, lambda: circuit.contributions(target), plain, repeats)


def connections(model: Any, transcoders: TranscoderSet, repeats: int) -> None:
    """The strongest connections of one feature with those of all other layers."""
    first, *_, last = transcoders.layers
    width = transcoders.config(first).d_transcoder
    vector = torch.randn(transcoders.config(first).d_in)
    cases: list[tuple[Any, int, Any]] = [
        ("up", first, None),
        ("down", last, None),
        ("up", first, (1, 0)),
    ]
    for direction, layer, head in cases:

        def work(direction: Any = direction, layer: int = layer, head: Any = head) -> None:
            top_connections(model, transcoders, layer, 7, direction=direction, head=head)

        def plain(direction: str = direction, layer: int = layer) -> None:
            for other in transcoders.layers:
                if other != layer:
                    module = transcoders.source.load(other)
                    weight = module.W_enc if direction == "up" else module.W_dec
                    torch.matmul(weight.detach(), vector)  # type: ignore[arg-type]

        through = f" through head {head[1]} of layer {head[0]}" if head else ""
        name = f"top connections {direction}{through}, {len(transcoders)} x {width} features"
        against(name, work, plain, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three small layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n_layers, width, n_positions = (3, 1024, 16) if arguments.quick else (12, 24576, 64)
    config = transformers.GPT2Config(
        vocab_size=5000, n_layer=n_layers, bos_token_id=0, eos_token_id=0
    )
    model = nnsight.NNsight(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    )
    ids = torch.randint(0, 5000, (n_positions,), generator=torch.Generator().manual_seed(0))
    run = collect(model, resolve_sites(model), ids)
    transcoders = random_transcoders(
        run, "per-layer", d_transcoder=width, activation="topk", k=32, relu_first=False
    )
    circuit = CircuitRun.collect(model, transcoders, ids)
    contributions(circuit, arguments.repeats)
    connections(model, transcoders, arguments.repeats)


if __name__ == "__main__":
    main()

"""Time and memory of opening a set, loading one layer, and reading rows, at real sizes.

    python benchmarks/open_set.py [--small] [--layers N] [--npz-layers N] [--folder DIR]

Writes a synthetic set with the shapes of Gemma Scope 2B (26 layers of 16384 features, d_model 2304)
in bfloat16 (about 4 GB) into a temporary folder, and some layers of the same in Gemma Scope's own
npz layout (float32), which are converted when a layer is first used. Each task runs in a process
of its own, three times; figures are medians. Times come with their ratio to loading one layer,
memory with its ratio to the size of one layer, since absolute times say little on a shared machine.

Memory is the rise of the peak resident set over that after the imports. Pages of a mapped file
count as long as they are mapped, though they are the operating system's to take back. Files come
from its cache: they have just been written.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsight_transcoders import Transcoder, TranscoderConfig, TranscoderSet
from nnsight_transcoders.hub.staging import canonical_tensors

N_ROWS = 100
REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """A set's size."""

    layers: int
    width: int
    d_model: int

    def layer_megabytes(self, bytes_per_weight: int) -> float:
        """Of the encoder and the decoder, which are nearly all of it."""
        return 2 * self.width * self.d_model * bytes_per_weight / 2**20


FULL, SMALL = Shape(26, 16384, 2304), Shape(4, 2048, 512)


class Synthetic:
    """Random layers, made when they are asked for: saving needs one in memory at a time."""

    def __init__(self, shape: Shape, n_layers: int, dtype: str) -> None:
        self.provenance: Mapping[str, Any] = {"format": "synthetic"}
        self.configs = {
            layer: TranscoderConfig(
                shape.d_model,
                shape.d_model,
                shape.width,
                layer=layer,
                activation="jumprelu",
                input_site="N0",
                output_site="O'",
                dtype=dtype,
            )
            for layer in range(n_layers)
        }

    def load(self, layer: int) -> Transcoder:
        config = self.configs[layer]
        generator = torch.Generator().manual_seed(layer)
        dtype = getattr(torch, config.dtype)
        threshold = torch.rand(config.d_transcoder, generator=generator).to(dtype)
        module = Transcoder(config, threshold).requires_grad_(False)
        for weight in (module.W_enc, module.W_dec):
            weight.normal_(generator=generator)
        return module

    def rows(self, layer: int, indices: Tensor, which: str) -> Tensor:
        module = self.load(layer)
        return (module.W_enc if which == "encoder" else module.W_dec)[indices]


def write_native(folder: Path, shape: Shape) -> None:
    """All layers in this package's layout, in bfloat16."""
    TranscoderSet(Synthetic(shape, shape.layers, "bfloat16")).save_pretrained(folder)


def write_npz(folder: Path, shape: Shape, n_layers: int) -> None:
    """Some layers in Gemma Scope's layout, in float32."""
    source = Synthetic(shape, n_layers, "float32")
    for layer in source.configs:
        place = folder / f"layer_{layer}" / "width_16k" / "average_l0_70"
        place.mkdir(parents=True)
        tensors = canonical_tensors(source.load(layer))
        tensors["W_enc"] = tensors["W_enc"].T
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(place / "params.npz", **arrays)


# -- the tasks, each in a process of its own -----------------------------------------------------


def _open(folder: Path) -> TranscoderSet:
    return TranscoderSet.from_pretrained(folder, cache_dir=folder.parent / "cache")


def _rows(folder: Path) -> None:
    chosen = _open(folder)
    indices = torch.randperm(chosen.config(1).d_transcoder)[:N_ROWS]
    chosen.rows(1, indices, "decoder")
    chosen.rows(1, indices, "encoder")


def _load_all(folder: Path) -> None:
    chosen = _open(folder)
    for layer in chosen:
        chosen.load(layer)


TASKS: dict[str, Callable[[Path], Any]] = {
    "open": _open,
    "open, load one layer": lambda folder: _open(folder).load(1),
    f"open, read {N_ROWS} encoder and decoder rows": _rows,
    "open, load all layers, keeping none": _load_all,
}


def resident_peak(*, reset: bool = False) -> float:
    """The process's peak resident set in MB; where Linux allows, counted from the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run_task(name: str, folder: Path) -> None:
    """In the child: do it once and print its time and memory."""
    import nnsight_transcoders.hub.registry  # noqa: F401 - imports are not what is measured

    before, start = resident_peak(reset=True), time.perf_counter()
    TASKS[name](folder)
    figures = {"seconds": time.perf_counter() - start, "megabytes": resident_peak() - before}
    print(json.dumps(figures))  # noqa: T201


def measure(name: str, folder: Path, repeats: int = REPEATS) -> dict[str, float]:
    """The medians of a task over several processes."""
    command = [sys.executable, __file__, "--task", name, "--folder", str(folder)]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def report(title: str, folder: Path, megabytes: float, first: bool) -> None:
    """Measure all tasks on one set and print a table; ``first``: also before its conversion."""
    tasks = list(TASKS)
    found = {}
    if first:
        found["first open"] = measure(tasks[0], folder, 1)
        found["first open, load one layer (converts it)"] = measure(tasks[1], folder, 1)
        measure(tasks[3], folder, 1)
    found |= {name: measure(name, folder) for name in tasks}
    one = found[tasks[1]]["seconds"]
    lines = [f"\n{title}; one layer is {megabytes:.0f} MB\n"]
    lines += [
        "| task | seconds | : one layer | peak MB | : one layer |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figures in found.items():
        seconds, memory = figures["seconds"], figures["megabytes"]
        lines.append(
            f"| {name} | {seconds:.3f} | {seconds / one:.2f} | {memory:.0f} | "
            f"{memory / megabytes:.2f} |"
        )
    print("\n".join(lines), flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a small set, for a quick run")
    parser.add_argument("--layers", type=int, help="layers of the native set")
    parser.add_argument("--npz-layers", type=int, default=4, help="layers of the npz set")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_task(arguments.task, arguments.folder)
        return
    shape = SMALL if arguments.small else FULL
    if arguments.layers:
        shape = Shape(arguments.layers, shape.width, shape.d_model)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        native, npz = Path(name) / "native", Path(name) / "npz"
        start = time.perf_counter()
        write_native(native, shape)
        size = sum(file.stat().st_size for file in native.iterdir()) / 2**30
        seconds = time.perf_counter() - start
        print(f"wrote {size:.2f} GB in {seconds:.0f} s")  # noqa: T201
        title = f"native, {shape.layers} x {shape.width} x {shape.d_model}"
        report(f"{title}, bfloat16", native, shape.layer_megabytes(2), first=False)
        write_npz(npz, shape, arguments.npz_layers)
        title = f"gemma-scope npz, {arguments.npz_layers} x {shape.width} x {shape.d_model}"
        report(f"{title}, float32", npz, shape.layer_megabytes(4), first=True)


if __name__ == "__main__":
    main()

"""How time and memory of ``attribute`` grow with targets, prompt length, layers and d_transcoder.

    python benchmarks/scaling.py                       # all four series, a few minutes
    python benchmarks/scaling.py --series positions
    python benchmarks/scaling.py --long                # T = 512 and 2,048 on GPT-2 small's shapes

Each case is a model with random weights and a set on disk, made once in ``--work``, and one graph
in a process of its own with one thread: processor time, and the process's peak resident set beyond
what it held once model and libraries were loaded. One quantity varies along a series, from a
base of 12 layers, width 512, T = 32, 8,192 features a layer and 1,000 active ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from peers.material import Case, make

HERE = Path(__file__).parent
BASE_LAYERS = 12


def _model(n_layers: int) -> Any:
    return transformers.GPT2Config(
        vocab_size=5000, n_positions=2048, n_embd=512, n_head=8, n_layer=n_layers
    )


def _base(name: str, **changes: Any) -> Case:
    case = Case(name, partial(_model, BASE_LAYERS), (), 8192, 32, 1000 / (BASE_LAYERS * 31))
    return replace(case, **changes)


def series() -> dict[str, list[Case]]:
    """The cases of each series."""
    l0 = _base("base").l0
    return {
        "targets": [
            _base(f"targets-{n}", l0=n / (BASE_LAYERS * 31)) for n in (250, 500, 1000, 2000, 4000)
        ],
        "positions": [  # the same number of features becomes nodes, of more and more active ones
            _base(f"positions-{t}", n_positions=t, max_feature_nodes=400)
            for t in (16, 32, 64, 128, 256, 512)
        ],
        "layers": [
            _base(f"layers-{n}", config=partial(_model, n), l0=l0 * BASE_LAYERS / n)
            for n in (3, 6, 12, 24)
        ],
        "d_transcoder": [
            _base(f"d_transcoder-{n}", d_transcoder=n) for n in (2048, 8192, 32768, 131072)
        ],
    }


def long_prompts() -> list[tuple[Case, str]]:
    """GPT-2 small's shapes at T = 512 and 2,048, with what is offloaded."""
    case = Case("long", partial(_gpt2, 2048), (), 24576, 512, 5.4, max_feature_nodes=2000)
    longest = replace(case, n_positions=2048, max_feature_nodes=200)
    many = replace(longest, name="longest-50", l0=50, max_feature_nodes=50)
    longest = replace(longest, name="longest")
    return [(case, ""), (longest, ""), (longest, "disk"), (many, ""), (many, "disk")]


def _gpt2(n_positions: int) -> Any:
    return transformers.GPT2Config(n_positions=n_positions)


def measured(case: Case, work: Path, offload: str = "") -> dict[str, Any]:
    """One graph in a process of its own: what ``peers/ours.py`` reports."""
    folder = make(case, work / case.name, None)
    command = [sys.executable, str(HERE / "peers" / "ours.py"), str(folder), str(folder / "out")]
    if offload:
        command += ["--offload", offload]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads((folder / "out.json").read_text())


def row(record: dict[str, Any], label: str) -> str:
    """One line of a table."""
    seconds, megabytes = record["seconds"], record["megabytes"]
    base = megabytes.pop("loaded")
    cells = [
        label,
        f"{record['n_active']:,}",
        f"{record['n_nodes']:,}",
        *(f"{seconds[phase]:.2f}" for phase in ("forward", "features", "edges")),
        f"{1000 * seconds['edges'] / record['n_nodes']:.2f}",
        *(f"{megabytes[phase] - base:.0f}" for phase in ("forward", "features", "edges")),
        f"{max(megabytes[phase] for phase in megabytes if phase != 'load'):.0f}",
        f"{record['completeness_error']:.0e}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| {} | active | nodes | forward s | features s | edges s | ms per target | forward MB | "
    "features MB | edges MB | whole process MB | completeness |\n" + "| --- " * 12 + "|"
)


def say(text: str) -> None:
    """Results go to standard output at once."""
    print(text, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--series", choices=series(), action="append", help="default: all")
    parser.add_argument("--long", action="store_true", help="long prompts instead of the series")
    parser.add_argument("--work", type=Path, default=Path("out/scaling"))
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    if arguments.long:
        say(HEADER.format("T, offload"))
        for case, offload in long_prompts():
            record = measured(case, work, offload)
            say(row(record, f"{case.n_positions}, {offload or 'none'}"))
        return
    for name in arguments.series or series():
        say(f"\n## {name}\n\n" + HEADER.format(name))
        for case in series()[name]:
            say(row(measured(case, work), case.name.rpartition("-")[2]))
            shutil.rmtree(work / case.name)  # sets are large


if __name__ == "__main__":
    main()

"""This package against circuit-tracer: the same files, prompt and settings, in turn.

    python benchmarks/peers/compare.py                    # tiny cases: agreement
    python benchmarks/peers/compare.py gpt2-small --repeats 3
    python benchmarks/peers/compare.py smollm2 --smollm2 FOLDER

Builds an environment with circuit-tracer (once, about 2 GB, in ``--environment``), makes each
case's model and set on disk (once, in ``--work``), and runs the tools alternately, each run in a
process of its own with one thread. Prints what agrees, and processor time and peak memory by
phase as medians, with the ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agreement import compare
from material import CASES, Case, make
from safetensors.torch import load_file

HERE = Path(__file__).parent
#: circuit-tracer 0.5 imports a module of nnsight that 0.8 no longer has.
PACKAGES = ("circuit-tracer==0.5.0", "nnsight<0.8")
#: Phases after loading, of either tool. The edge phase is ``edges``.
PHASES = ("forward", "freeze", "features", "targets", "edges", "assemble")

Record = dict[str, Any]


def environment(folder: Path, torch_spec: str) -> Path:
    """The Python of an environment with circuit-tracer, built where there is none."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in (torch_spec.split(), PACKAGES):  # torch first: its build is the user's
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / ".installed").touch()
    return python


def run(command: list[str], out: Path) -> Record:
    """One graph in a process of its own; what it wrote to ``OUT.json``."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.with_name(out.name + ".json").read_text())


def medians(records: list[Record]) -> dict[str, dict[str, float]]:
    """Phase -> median over the runs, for ``seconds`` and ``megabytes``; with totals."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("seconds", "megabytes"):
        phases = {
            phase: statistics.median(record[kind].get(phase, 0.0) for record in records)
            for phase in ("load", *PHASES)
        }
        of_run: Callable[[Any], float] = sum if kind == "seconds" else max
        phases["attribute"] = statistics.median(
            of_run(value for phase, value in record[kind].items() if phase != "load")
            for record in records
        )
        found[kind] = phases
    return found


def table(ours: Record, theirs: Record) -> str:
    """Both tools' medians by phase and their ratios, as Markdown."""
    lines = [
        "| phase | CPU s | circuit-tracer | ratio | peak MB | circuit-tracer | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for phase in ("load", *PHASES, "attribute"):
        cells = [phase]
        for kind, form in (("seconds", ".2f"), ("megabytes", ".0f")):
            mine, other = ours[kind][phase], theirs[kind][phase]
            ratio = f"{other / mine:.1f}" if mine and other else "-"
            cells += [f"{value:{form}}" if value else "-" for value in (mine, other)] + [ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_case(case: Case, folder: Path, python: Path, repeats: int) -> None:
    """Run a case and print its tables."""
    mine = [sys.executable, str(HERE / "ours.py"), str(folder), str(folder / "ours")]
    variants = {
        f"{backend}-{size}": [
            str(python),
            str(HERE / "theirs.py"),
            str(folder),
            backend,
            str(size),
            str(folder / f"{backend}-{size}"),
        ]
        for backend in case.backends
        for size in case.batch_sizes
    }
    ours: list[Record] = []
    theirs: dict[str, list[Record]] = {name: [] for name in variants}
    for _ in range(repeats):
        ours.append(run(mine, folder / "ours"))
        for name, command in variants.items():
            theirs[name].append(run(command, folder / name))
    our_tables = load_file(folder / "ours.safetensors")
    say(f"\n## {case.name}: T={case.n_positions}, d_transcoder={case.d_transcoder}, {case.kind}")
    say(f"completeness error of ours {ours[-1]['completeness_error']:.1e}")
    for name, records in theirs.items():
        found = compare(our_tables, load_file(folder / f"{name}.safetensors"))
        same = "the same" if found.same_features else "DIFFERENT"
        say(
            f"\n### against {name}\n"
            f"features {found.features} {same}; "
            f"logits {'the same' if found.same_logits else 'DIFFERENT'}; "
            f"largest difference (relative): activations {found.activation}, "
            f"probabilities {found.probability}, errors {found.error}, "
            f"adjacency {found.adjacency} over {found.entries} entries, "
            f"relative to its own row {found.worst_row:.1e}\n"
        )
        say(table(medians(ours), medians(records)))
    versions = {"ours": ours[-1]["versions"], "theirs": next(iter(theirs.values()))[-1]["versions"]}
    say(f"\nversions {json.dumps(versions)}")


def machine() -> str:
    """The processor and what is free of it."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0] if names else platform.processor()}, {platform.system()}"


def say(text: str) -> None:
    """Results go to standard output at once."""
    print(text, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: the tiny ones)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--environment", type=Path, default=Path(".venv-peers/compare"))
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs as torch")
    parser.add_argument("--smollm2", type=Path, help="a folder with SmolLM2-135M")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.cases) - set(CASES)):
        parser.error(f"unknown case(s) {', '.join(unknown)}; known: {', '.join(CASES)}")
    python = environment(arguments.environment.absolute(), arguments.torch)
    say(f"machine: {machine()}; one thread")
    for name in arguments.cases or [name for name in CASES if name.startswith("tiny")]:
        folder = make(CASES[name], arguments.work.absolute() / name, arguments.smollm2)
        run_case(CASES[name], folder, python, arguments.repeats)


if __name__ == "__main__":
    main()

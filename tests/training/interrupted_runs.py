"""Runs a small training in forked children and kills them; a script of its own process.

    python interrupted_runs.py FOLDER SEED KILLS

makes the runs ``whole`` (nothing ends it), ``random`` (killed at random times), ``files`` (killed
at random operations on files) and ``full`` (the disk is full half-way) in FOLDER, each to its end,
and prints how often the second and the third were killed.

The parent never computes a gradient, so that its children may (autograd and fork), and everything
is imported once.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from planted import CONTEXT, planted_model, rows

from nnsight_transcoders import TrainConfig, train
from nnsight_transcoders.errors import InputError

#: Look whether a child has ended without taking its exit code.
ALIVE = os.WEXITED | os.WNOHANG | os.WNOWAIT
#: Bytes that a file may have on the full disk: more than the log, less than a checkpoint.
LIMIT = 40_000
#: A checkpoint after every step: half of the time goes into writing them.
CONFIG = TrainConfig(
    context=CONTEXT,
    pack=True,
    d_transcoder=96,
    activation="batchtopk",
    k=4,
    batch_size=256,
    buffer_size=2048,
    rows_per_forward=8,
    n_tokens=256 * 40,
    lr=0.01,
    dead_after=1000,
    checkpoint_every=1,
    log_every=1,
    evaluate_every=10,
    evaluate_rows=4,
)


@cache
def model() -> Any:
    """Made once, before the children are."""
    torch.set_num_threads(1)
    return planted_model()[0]


def run(folder: Path) -> None:
    train(model(), rows(200), CONFIG, out=folder, verbose=False)


def child(work: Callable[[], None]) -> int:
    """Start a child that does the work and leaves with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code; the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_random_times(folder: Path, rng: random.Random, kills: int) -> int:
    for i in range(kills):
        wanted = newest(folder) + rng.randint(1, 3)
        pid = child(lambda: run(folder))
        while newest(folder) < wanted and os.waitid(os.P_PID, pid, ALIVE) is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            return i
    return kills


def newest(folder: Path) -> int:
    """Steps of the newest complete checkpoint; 0 without one."""
    names = [path.name for path in (folder / "checkpoint").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def killed_at_file_operations(folder: Path, rng: random.Random, kills: int) -> int:
    for i in range(kills):
        if run_until(folder, rng.randint(3, 60)) == 0:
            return i
    return kills


def run_until(folder: Path, n: int) -> int:
    """Run in a child that ends itself at its n-th operation on files of the folder."""

    def work() -> None:
        seen = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal seen
            watched = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
            if event in watched and str(folder) in str(args[0]):
                seen += 1
                if seen == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run(folder)

    code = ended(child(work))
    assert code in (0, -signal.SIGKILL), code
    return code


def full_disk(folder: Path) -> None:
    """Run until some checkpoints are there, go on with no room for another one, then with room."""
    assert run_until(folder, 80) == -signal.SIGKILL

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        try:
            run(folder)
        except InputError as error:
            (folder / "message").write_text(str(error))
            return
        raise AssertionError("nothing was said of the full disk")

    before = checkpoint_files(folder)
    assert before
    assert ended(child(work)) == 0
    assert checkpoint_files(folder) == before


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """What the newest complete checkpoint holds, by file."""
    last = folder / "checkpoint" / f"step_{newest(folder):08d}"
    return {str(path): path.read_bytes() for path in sorted(last.iterdir())}


def main() -> None:
    folder, rng, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])
    model()
    done = [
        killed_at_random_times(folder / "random", rng, kills),
        killed_at_file_operations(folder / "files", rng, kills),
    ]
    full_disk(folder / "full")
    for name in ("whole", "random", "files", "full"):
        assert ended(child(lambda name=name: run(folder / name))) == 0
    sys.stdout.write(" ".join(map(str, done)))


if __name__ == "__main__":
    main()

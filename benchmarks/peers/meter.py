"""Processor time and peak memory, phase by phase. Standard library only: both tools import it.

The peak of the resident set is the kernel's own (``VmHWM``), set back at the start of each phase,
so a phase's figure is the most that the whole process held during it: interpreter, libraries,
model and all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes() -> float:
    """The peak resident set since it was last set back."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not report VmHWM")


class Meter:
    """What each phase took. A phase that runs several times adds up.

    Attributes:
        seconds: Phase -> processor seconds (all threads).
        megabytes: Phase -> peak resident set.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.megabytes: dict[str, float] = {}
        self._open: tuple[str, float] | None = None

    def start(self, name: str) -> None:
        """End the phase under way and begin another."""
        self.stop()
        with suppress(OSError):  # else phases report the largest peak so far
            _CLEAR.write_text("5")
        self._open = (name, time.process_time())

    def stop(self) -> None:
        """End the phase under way."""
        if self._open is not None:
            name, began = self._open
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
            self.megabytes[name] = max(self.megabytes.get(name, 0.0), peak_megabytes())
            self._open = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """``start`` and ``stop`` around a block."""
        self.start(name)
        yield
        self.stop()

    def to_dict(self) -> dict[str, dict[str, float]]:
        """JSON-ready."""
        return {"seconds": self.seconds, "megabytes": self.megabytes}

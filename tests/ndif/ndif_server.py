"""Starts and stops a real NDIF server on loopback, on the CPU, with the builtin model.

    python tests/ndif/ndif_server.py start | stop | status

Redis, an S3 store (moto), a Hub with the builtin model, Ray with NDIF's controller, and NDIF's web
application, in this order. `start` begins what is missing; `stop` ends what `start` began and
nothing else. `make test-ndif` builds the environment that this needs; `ndif_layout` says where
everything is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ndif_layout import HOST, START_SECONDS, Layout, commands, controller, environment

_STOP_SECONDS = 30.0


class ServerError(Exception):
    """The server cannot be started; says why, and how its log ends."""


@dataclass(frozen=True)
class Process:
    """A process that was started here; `started` tells it from a later one with the same id."""

    pid: int
    started: int

    def alive(self) -> bool:
        return _start_time(self.pid) == self.started

    def signal_group(self, how: signal.Signals) -> None:
        """Send a signal to the process and those of its descendants that stayed in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, how)


class Server:
    """One server, which may be running or not."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.url = layout.url()
        self.hub_url = layout.url("hub")
        self._state = layout.home / "processes.json"

    # -- start -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start what is not running; returns when requests are served.

        Raises:
            ServerError: If something is not installed, a port is taken, or a part ends or hangs.
        """
        self._check_installed()
        (self.layout.home / "logs").mkdir(parents=True, exist_ok=True)
        self.layout.ray_dir.mkdir(mode=0o700, exist_ok=True)
        self._write_runner()
        for name, command in commands(self.layout).items():
            if self.running(name):
                continue
            self._check_port_free(name)
            self._launch(name, command)
            self._wait(name, lambda name=name: _listening(self.layout.port(name)))
            if name == "ray":
                self._wait(name, lambda: _listening(self.layout.port("dashboard")))
                self._wait(name, lambda: _listening(self.layout.port("ray_client")))
                self._start_controller()
        self._wait("api", lambda: _answers(f"{self.url}/connected"))

    def running(self, *names: str) -> bool:
        """Whether these parts (none named: all) run and were started here."""
        processes = self.processes()
        wanted = names or tuple(commands(self.layout))
        return all(name in processes and processes[name].alive() for name in wanted)

    def _check_installed(self) -> None:
        if not Path(self.layout.program("gunicorn")).exists():
            raise ServerError(
                f"no NDIF in {self.layout.venv}: `make test-ndif` builds it there "
                "(the variable NDIF names another place)"
            )
        if shutil.which("redis-server") is None:
            raise ServerError(
                "redis-server is not installed; on Debian and Ubuntu: "
                "apt-get install --no-install-recommends redis-server"
            )

    def _check_port_free(self, name: str) -> None:
        if _listening(self.layout.port(name)):
            raise ServerError(
                f"port {self.layout.port(name)}, for {name}, is in use by another program; "
                "the variable NDIF_PORT sets the first of the ports"
            )

    def _write_runner(self) -> None:
        """The Python of sandboxed requests, for which NDIF empties the environment: it puts back
        the mark, and has them look for the model in the cache, since they know no Hub."""
        runner = self.layout.home / "runner"
        python = self.layout.program("python")
        given = f'HF_HUB_OFFLINE=1 NDIF_TEST_SERVER="{self.layout.home}"'
        runner.write_text(f'#!/bin/sh\n{given} exec "{python}" "$@"\n')
        runner.chmod(0o755)

    def _launch(self, name: str, command: list[str]) -> None:
        with self.layout.log(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment(self.layout),
                cwd=self.layout.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = _start_time(process.pid)
        if started is None:
            raise ServerError(f"{name} ended at once\n{self._tail(name)}")
        self._save({**self.processes(), name: Process(process.pid, started)})

    def _start_controller(self) -> None:
        with self.layout.log("controller").open("ab") as log:
            done = subprocess.run(
                controller(self.layout),
                env=environment(self.layout),
                cwd=self.layout.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=START_SECONDS,
                check=False,
            )
        if done.returncode:
            raise ServerError(f"NDIF's controller did not start\n{self._tail('controller')}")

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            if not self.running(name):
                raise ServerError(f"{name} ended while starting\n{self._tail(name)}")
            if time.monotonic() > end:
                raise ServerError(f"{name} was not ready in {START_SECONDS} s\n{self._tail(name)}")
            time.sleep(0.2)

    def _tail(self, name: str) -> str:
        log = self.layout.log(name)
        return "\n".join([f"{log} ends with:", *log.read_text(errors="replace").splitlines()[-15:]])

    # -- stop ------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End what `start` began; each part may finish first."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would: nothing gets to finish."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        processes = self.processes()
        for name in reversed(commands(self.layout)):
            process = processes.pop(name, None)
            if process is None:
                continue
            if process.alive():
                process.signal_group(how)
                _until(lambda process=process: not process.alive(), _STOP_SECONDS)
                process.signal_group(signal.SIGKILL)
            self._save(processes)
        for pid in self._marked():  # what left its process group, if anything did
            os.kill(pid, signal.SIGKILL)
        _until(lambda: not self._marked(), _STOP_SECONDS)
        shutil.rmtree(self.layout.ray_dir, ignore_errors=True)

    def _marked(self) -> list[int]:
        """The processes that carry this server's mark in their environment."""
        mark = f"NDIF_TEST_SERVER={self.layout.home}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    # -- state -----------------------------------------------------------------------------------

    def processes(self) -> dict[str, Process]:
        """The parts that were started, whether they still run or not."""
        if not self._state.exists():
            return {}
        return {name: Process(*both) for name, both in json.loads(self._state.read_text()).items()}

    def _save(self, processes: dict[str, Process]) -> None:
        state = {name: (process.pid, process.started) for name, process in processes.items()}
        self._state.write_text(json.dumps(state))


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks from boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((HOST, port)) == 0


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


def main(arguments: list[str]) -> int:
    server = Server(Layout.from_environment())
    if arguments not in (["start"], ["stop"], ["status"]):
        sys.stderr.write("usage: ndif_server.py start | stop | status\n")
        return 2
    try:
        if arguments != ["status"]:
            getattr(server, arguments[0])()
    except ServerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    state = f"serves at {server.url}" if server.running() else "is not running"
    sys.stdout.write(f"NDIF {state} (logs: {server.layout.home / 'logs'})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

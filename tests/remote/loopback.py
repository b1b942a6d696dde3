"""A small NDIF server on loopback: NDIF's wire protocol around the process of ``served.py``.

It speaks what nnsight 0.8.1's client speaks to ndif 0.1.2 (``POST /request``, ``GET
/response/<id>``, a URL for the result, zstd on both ways, ``env`` applied before a job) and runs
jobs in a process where importing ``nnsight_transcoders`` fails. It can be told to misbehave
(``POST /control``), and be killed and started again. The real server is in ``tests/ndif``.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import zstandard

#: What ``/control`` can set: refuse requests with a status code and a text; hold jobs back.
SETTINGS: dict[str, Any] = {"refuse": None, "refuse_times": 0, "detail": "no", "hold": False}


class Nursery:
    """A process that has loaded the model and forks servers from itself: each then starts at once,
    and can be killed."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, port: int, state: Path | None) -> int:
        """Start a server; its process id."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([port, str(state or "")]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@cache
def nursery(folder: str) -> Nursery:
    """One for each model; it ends with the tests, whose end of its input closes then."""
    return Nursery(folder)


class Loopback:
    """The client's side: starts, controls and kills a server process.

    Args:
        folder: The model that it serves.
        folder_of_state: Where it keeps answers, so that they outlive it; None keeps them in memory.
    """

    def __init__(self, folder: str, folder_of_state: Path | None = None) -> None:
        self.folder, self.state = folder, folder_of_state
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid: int | None = None

    def start(self) -> Loopback:
        """Start the process and wait until it answers."""
        self.pid = nursery(self.folder).start(self.port, self.state)
        for _ in range(600):
            try:
                httpx.get(f"{self.url}/ping", timeout=5)
                return self
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError("the loopback server does not answer")

    def kill(self) -> None:
        """End the process at once."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = None
            while True:  # until nobody answers on its port
                try:
                    httpx.get(f"{self.url}/ping", timeout=5)
                except httpx.HTTPError:
                    return

    def control(self, **settings: Any) -> None:
        """Set ``SETTINGS``."""
        httpx.post(f"{self.url}/control", json=settings, timeout=5).raise_for_status()

    def requests(self) -> list[int]:
        """Sizes of the requests that were accepted so far."""
        return httpx.get(f"{self.url}/requests", timeout=5).json()


class Server:
    """The server's side: jobs and their answers."""

    def __init__(self, model: Any, url: str, state: Path | None) -> None:
        self.model, self.url, self.state = model, url, state
        self.settings = dict(SETTINGS)
        self.responses: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.sizes: list[int] = []
        self.lock = threading.Lock()

    def accept(self, data: dict[str, Any], blob: bytes) -> dict[str, Any]:
        job = uuid.uuid4().hex
        self.sizes.append(len(blob))
        threading.Thread(target=self._run, args=(job, data, blob), daemon=True).start()
        return {"id": job, "status": "RECEIVED", "description": "received"}

    def _run(self, job: str, data: dict[str, Any], blob: bytes) -> None:
        self._say(job, "QUEUED")
        with self.lock:
            self._say(job, "RUNNING")
            while self.settings["hold"]:
                time.sleep(0.01)
            raw = zstandard.ZstdDecompressor().decompress(blob) if data["compress"] else blob
            self.model._remoteable_set_env(data["env"])
            kind, value = answer(self.model, raw)
            if kind == "error":
                self._say(job, "ERROR", description=value)
                return
            if data["compress"]:
                value = zstandard.ZstdCompressor(level=3).compress(value)
            self._keep(f"{job}.result", value)
            self._say(job, "COMPLETED", data=f"{self.url}/result/{job}")

    def _say(self, job: str, status: str, **more: Any) -> None:
        content = {"id": job, "status": status, "description": "", **more}
        self._keep(f"{job}.json", json.dumps(content).encode())

    def _keep(self, name: str, content: bytes) -> None:
        if self.state is None:
            self.results[name] = content
        else:
            partial = self.state / f"{name}.part"
            partial.write_bytes(content)
            partial.replace(self.state / name)

    def get(self, name: str) -> bytes | None:
        if self.state is None:
            return self.results.get(name)
        path = self.state / name
        return path.read_bytes() if path.exists() else None


class Handler(BaseHTTPRequestHandler):
    """NDIF's routes."""

    server_state: Server

    def do_GET(self) -> None:
        state, (kind, _, name) = self.server_state, self.path[1:].partition("/")
        if kind == "response":
            self._found(state.get(f"{name}.json"))
        elif kind == "result":
            self._found(state.get(f"{name}.result"))
        elif kind == "requests":
            self._send(200, json.dumps(state.sizes).encode())
        else:
            self._send(200, b'"pong"')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state = self.server_state
        if self.path == "/control":
            state.settings.update(json.loads(body))
            self._send(200, b"{}")
            return
        if state.settings["refuse_times"] > 0:
            state.settings["refuse_times"] -= 1
            detail = json.dumps({"detail": state.settings["detail"]}).encode()
            self._send(state.settings["refuse"], detail)
            return
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        parts = {p.get_param("name", header="content-disposition"): p for p in form.iter_parts()}
        data = json.loads(parts["data"].get_payload(decode=True))
        answer = state.accept(data, parts["blob"].get_payload(decode=True))
        self._send(200, json.dumps(answer).encode())

    def _found(self, content: bytes | None) -> None:
        self._send(404 if content is None else 200, content or b"{}")

    def _send(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(folder: str) -> None:
    """Load the model, then start a server for each line of input."""
    sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
    import nnsight
    import torch

    torch.set_num_threads(1)
    model = nnsight.TransformersModel(folder, task="text-generation", dispatch=True)
    model._module.requires_grad_(False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    for line in sys.stdin:
        port, state = json.loads(line)
        pid = os.fork()
        if pid == 0:
            threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
            address = f"http://127.0.0.1:{port}"
            Handler.server_state = Server(model, address, Path(state) if state else None)
            ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def end_with_parent(parent: int) -> None:
    """End this process when the one it was forked from is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    from served import Absent, answer

    serve(sys.argv[1])

"""A forwarder on loopback between client and server, which records what passes, and can cut it."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Exchange:
    """One request.

    Attributes:
        method: Of HTTP.
        path: Without the query.
        blob: Bytes of the job that it carries; 0 if it carries none.
        envelope: What is said about the job (JSON text).
    """

    method: str
    path: str
    blob: int
    envelope: str


class Cut(Exception):
    """Raised by `before`: the connection is closed without an answer."""


class Wire:
    """What passes between a client and a server.

    Attributes:
        url: The address that the client is given.
        exchanges: Every request so far.
        before: Called with each request before it is forwarded; `Cut` ends it there.
        after: The same with the answer's status, which the client has not heard yet.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        self.exchanges: list[Exchange] = []
        self.before: Callable[[Exchange], None] = lambda exchange: None  # noqa: ARG005
        self.after: Callable[[Exchange, int], None] = lambda exchange, status: None  # noqa: ARG005

    def jobs(self) -> list[Exchange]:
        """The requests that carried a job."""
        return [e for e in self.exchanges if (e.method, e.path) == ("POST", "/request")]

    @contextlib.contextmanager
    def running(self) -> Iterator[Wire]:
        """Forward until the block ends."""
        handler = type("Handler", (_Handler,), {"wire": self})
        forwarder = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        forwarder.daemon_threads = True
        self.url = f"http://127.0.0.1:{forwarder.server_address[1]}"
        thread = threading.Thread(target=forwarder.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            forwarder.shutdown()
            forwarder.server_close()
            thread.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Bytes from one to the other until the first ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class _Handler(BaseHTTPRequestHandler):
    wire: Wire

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.headers.get("Upgrade"):
            return self._tunnel()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        exchange = self._exchange(body)
        self.wire.exchanges.append(exchange)
        try:
            self.wire.before(exchange)
            status, kind, answer = self._forward(body)
            self.wire.after(exchange, status)
        except (Cut, OSError, http.client.HTTPException):
            self.close_connection = True
            return None
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        return None

    do_POST = do_GET

    def _tunnel(self) -> None:
        """A websocket, on which nnsight's own requests wait: bytes both ways until it ends."""
        server = urlsplit(self.wire.upstream)
        with socket.create_connection((str(server.hostname), server.port)) as upstream:
            head = [self.requestline, *(f"{k}: {v}" for k, v in self.headers.items()), "", ""]
            upstream.sendall("\r\n".join(head).encode())
            back = threading.Thread(target=_pump, args=(upstream, self.connection))
            back.start()
            _pump(self.connection, upstream)
            back.join()
        self.close_connection = True

    def _exchange(self, body: bytes) -> Exchange:
        blob, envelope = b"", ""
        found = re.search(r"boundary=([^;]+)", self.headers.get("Content-Type", ""))
        for part in body.split(b"--" + found[1].encode()) if found else ():
            head, _, content = part.partition(b"\r\n\r\n")
            if b'name="blob"' in head:
                blob = content.removesuffix(b"\r\n")
            elif b'name="data"' in head:
                envelope = content.removesuffix(b"\r\n").decode()
        return Exchange(self.command, urlsplit(self.path).path, len(blob), envelope)

    def _forward(self, body: bytes) -> tuple[int, str, bytes]:
        server = urlsplit(self.wire.upstream)
        connection = http.client.HTTPConnection(str(server.hostname), server.port, timeout=600)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type", ""), answer.read()
        finally:
            connection.close()

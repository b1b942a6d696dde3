"""Uploading, against a server on this machine that checks what arrives."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from graphs import exported, named

from nnsight_transcoders import upload_graph
from nnsight_transcoders.errors import CheckpointError, InputError, UploadError
from nnsight_transcoders.interop import upload

KEY = "sk-secret"


class Neuronpedia(ThreadingHTTPServer):
    """Takes uploads as Neuronpedia does, and remembers every request.

    ``answers``: path -> (status, body) to give instead.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.promised: dict[str, Any] = {}
        self.stored: bytes | None = None
        self.saved: dict[str, Any] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Neuronpedia

    def do_POST(self) -> None:
        data = json.loads(self._body())
        if self._given():
            return
        if self.headers["X-Api-Key"] != KEY:
            self._send(401, {"error": "bad key"})
        elif self.path == "/api/graph/signed-put":
            assert set(data) == {"filename", "contentLength", "contentType"}
            self.server.promised = data
            put = f"{self.server.url}/bucket/file?signature=abc"
            self._send(200, {"url": put, "putRequestId": "put-1"})
        elif self.path == "/api/graph/save-to-db":
            assert data == {"putRequestId": "put-1"}
            assert self.server.stored is not None
            self.server.saved = json.loads(gzip.decompress(self.server.stored))
            self._send(200, {"url": "https://www.neuronpedia.org/tiny/graph?slug=a-graph"})
        else:
            self._send(404, {})

    def do_PUT(self) -> None:
        body = self._body()
        if self._given():
            return
        assert self.path == "/bucket/file?signature=abc"
        assert self.headers["Content-Encoding"] == "gzip"
        assert len(body) == self.server.promised["contentLength"]
        self.server.stored = body
        self._send(200, {})

    def _body(self) -> bytes:
        self.server.seen.append((self.command, self.path.split("?")[0]))
        self.server.headers_seen.append(dict(self.headers.items()))
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _given(self) -> bool:
        given = self.server.answers.get(self.path.split("?")[0])
        if given is not None:
            self._send(*given)
        return given is not None

    def _send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Neuronpedia]:
    with Neuronpedia() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


SIGNED, BUCKET, SAVE = "/api/graph/signed-put", "/bucket/file", "/api/graph/save-to-db"


def test_a_graph_arrives(server: Neuronpedia, tmp_path: Path) -> None:
    data = exported()
    address = upload_graph(data, api_key=KEY, base_url=f"{server.url}/")
    assert address == "https://www.neuronpedia.org/tiny/graph?slug=a-graph"
    assert server.seen == [("POST", SIGNED), ("PUT", BUCKET), ("POST", SAVE)]
    assert server.promised["filename"] == "a-graph.json"
    assert server.promised["contentType"] == "application/json"
    assert server.saved == data
    named().to_neuronpedia(tmp_path / "g.json", slug="a-graph", model_id="tiny")
    upload_graph(tmp_path / "g.json", api_key=KEY, base_url=server.url)
    assert server.saved == data


def test_the_key_goes_to_neuronpedia_only(
    server: Neuronpedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    upload_graph(exported(), base_url=server.url)
    signed, put, saved = server.headers_seen
    assert signed["X-Api-Key"] == saved["X-Api-Key"] == KEY
    assert KEY not in "".join(put.values())


@pytest.mark.parametrize(
    ("path", "status", "body", "message"),
    [
        (SIGNED, 401, b"{}", "the API key is not accepted"),
        (SIGNED, 404, b"nothing here", "the address is wrong.*nothing here"),
        (SIGNED, 413, b"", "too large"),
        (SIGNED, 429, b"", "too many requests"),
        (SIGNED, 500, b"", "try again later"),
        (SIGNED, 302, b"", "answered 302"),
        (SIGNED, 200, b"<html>", "no JSON"),
        (SIGNED, 200, b"{}", "without url and putRequestId"),
        (SIGNED, 200, b'{"url": 1, "putRequestId": 2}', "without url"),
        (SIGNED, 200, b"[]", "without url"),
        (BUCKET, 403, b"", "the storage refused the file"),
        (SAVE, 400, b'{"error": "Model does not exist"}', "it refused.*Model does not exist"),
        (SAVE, 200, b"{}", "without url"),
    ],
)
def test_refusals(server: Neuronpedia, path: str, status: int, body: bytes, message: str) -> None:
    server.answers[path] = (status, body)
    with pytest.raises(UploadError, match=message) as caught:
        upload_graph(exported(), api_key=KEY, base_url=server.url)
    assert KEY not in str(caught.value)
    assert server.seen[-1][1] == path  # nothing is sent after a refusal


def test_the_file_is_not_put_in_the_clear(server: Neuronpedia) -> None:
    answer = {"url": "http://example.org/bucket", "putRequestId": "put-1"}
    server.answers[SIGNED] = (200, json.dumps(answer).encode())
    with pytest.raises(InputError, match="must start with https"):
        upload_graph(exported(), api_key=KEY, base_url=server.url)
    assert server.seen == [("POST", SIGNED)]


def test_nobody_there() -> None:
    with pytest.raises(UploadError, match="could not be reached"):
        upload_graph(exported(), api_key=KEY, base_url="http://127.0.0.1:1")


def test_what_is_wrong_is_found_before_anything_is_sent(
    server: Neuronpedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with pytest.raises(InputError, match="no usable API key"):
        upload_graph(exported(), base_url=server.url)
    with pytest.raises(InputError, match="no usable API key"):
        upload_graph(exported(), api_key="a\nb", base_url=server.url)
    with pytest.raises(InputError, match="must start with https"):
        upload_graph(exported(), api_key=KEY, base_url="http://neuronpedia.org")
    data = exported()
    with pytest.raises(CheckpointError, match="letters, digits"):
        bad = {**data, "metadata": {**data["metadata"], "scan": "owner/set"}}
        upload_graph(bad, api_key=KEY, base_url=server.url)
    monkeypatch.setattr(upload, "MAX_BYTES", 2000)
    with pytest.raises(InputError, match="takes 1024 to 2000"):
        upload_graph(data, api_key=KEY, base_url=server.url)
    assert not server.seen

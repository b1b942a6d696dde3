"""The loopback server: what it shows, what it refuses, and that nobody else reaches it."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.viewer.server import Viewer

MakeGraph = Callable[..., AttributionGraph]


@pytest.fixture
def folder(tmp_path: Path, make_graph: MakeGraph) -> Path:
    """A folder with a graph, a page, a link that leads out, and a secret outside."""
    shown = tmp_path / "shown"
    (shown / "inner & <b>").mkdir(parents=True)
    make_graph().save(shown / "graph.safetensors")
    make_graph().save(shown / "inner & <b>" / "second.safetensors")
    (shown / "page.html").write_text("<p>a page</p>")
    (shown / "notes.txt").write_text("not shown")
    (shown / ".hidden.html").write_text("hidden")
    (shown / "broken.safetensors").write_bytes(b"\xff" * 30)
    (tmp_path / "secret.html").write_text("secret")
    (shown / "link.html").symlink_to(tmp_path / "secret.html")
    return shown


@pytest.fixture
def start() -> Iterator[Callable[..., Viewer]]:
    running: list[Viewer] = []

    def run(path: Path, **options: Any) -> Viewer:
        server = Viewer(path, **options)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield run
    for server in running:
        server.shutdown()
        server.server_close()


def ask(
    server: Viewer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.headers), text


def test_a_folder_is_listed_and_its_files_shown(folder: Path, start: Callable[..., Viewer]) -> None:
    server = start(folder)
    assert server.url == f"http://127.0.0.1:{server.server_port}/"
    status, headers, text = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    links = re.findall(r'href="([^"]*)"', text)
    assert links == [
        "inner%20%26%20%3Cb%3E/",
        "broken.safetensors",
        "graph.safetensors",
        "page.html",
    ]
    assert "<b>/" not in text
    assert ask(server, "/page.html")[2] == "<p>a page</p>"
    for path in ("/graph.safetensors", "/inner%20%26%20%3Cb%3E/second.safetensors"):
        status, _, page = ask(server, path)
        assert status == 200
        assert 'id="graph-data"' in page
    status, headers, _ = ask(server, "/inner%20%26%20%3Cb%3E")
    assert (status, headers["Location"]) == (301, "/inner%20%26%20%3Cb%3E/")
    assert "second.safetensors" in ask(server, "/inner%20%26%20%3Cb%3E/")[2]


def test_head_sends_no_body_and_other_methods_are_refused(
    folder: Path, start: Callable[..., Viewer]
) -> None:
    server = start(folder)
    status, headers, text = ask(server, "/page.html", "HEAD")
    assert (status, headers["Content-Length"], text) == (200, "13", "")
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, "/page.html", method)[0] == 501


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.html",
        "/%2e%2e/secret.html",
        "/inner%20%26%20%3Cb%3E/../../secret.html",
        "/..%2fsecret.html",
        "//etc/passwd",
        "/link.html",
        "/.hidden.html",
        "/notes.txt",
        "/nothing.html",
        "/%00",
        "/page.html%00.html",
    ],
)
def test_nothing_else_is_shown(folder: Path, start: Callable[..., Viewer], path: str) -> None:
    status, _, text = ask(start(folder), path)
    assert status == 404
    assert "secret" not in text.replace(path, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example"])
def test_other_host_names_are_refused(
    folder: Path, start: Callable[..., Viewer], host: str
) -> None:
    assert ask(start(folder), "/", host=host)[0] == 403


def test_it_listens_on_the_loopback_interface_only(
    folder: Path, start: Callable[..., Viewer]
) -> None:
    assert start(folder).server_address[0] == "127.0.0.1"


def test_a_damaged_file_is_named(folder: Path, start: Callable[..., Viewer]) -> None:
    status, _, text = ask(start(folder), "/broken.safetensors")
    assert status == 500
    assert "broken.safetensors" in text


def test_a_file_is_what_the_address_leads_to(folder: Path, start: Callable[..., Viewer]) -> None:
    server = start(folder / "graph.safetensors")
    assert server.url.endswith("/graph.safetensors")
    assert ask(server, "/page.html")[0] == 200


def test_graphs_of_other_tools_are_shown(
    folder: Path, start: Callable[..., Viewer], make_graph: MakeGraph
) -> None:
    make_graph().to_neuronpedia(folder / "other.json", slug="other", model_id="m")
    status, _, page = ask(start(folder), "/other.json")
    assert status == 200
    assert 'id="graph-data"' in page


def test_what_cannot_be_shown_is_said(folder: Path, start: Callable[..., Viewer]) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        Viewer(folder / "nothing")
    with pytest.raises(InputError, match="none of"):
        Viewer(folder / "notes.txt")
    taken = start(folder).server_port
    with pytest.raises(InputError, match=f"port {taken}"):
        Viewer(folder, port=taken)
    with pytest.raises(InputError, match="port 70000"):
        Viewer(folder, port=70_000)


def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    command = [sys.executable, "-m", "nnsight_transcoders", "view", str(folder), "--no-browser"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert found is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
        connection.request("GET", "/page.html")
        assert connection.getresponse().read() == b"<p>a page</p>"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0

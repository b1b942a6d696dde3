"""A folder of graphs, dashboards and pages, served to this machine only.

``nnsight-transcoders view`` starts it. It listens on the loopback interface, answers reads of what
it lists and nothing else, and refuses requests under a foreign host name, which is how a web page
elsewhere would try to read from it. Graphs and feature bundles become pages when they are asked
for.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from urllib.parse import quote, unquote, urlsplit

from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.errors import InputError, TranscoderError
from nnsight_transcoders.features.bundle import FeatureBundle
from nnsight_transcoders.features.bundle_files import INDEX

from .page import render_graph

_PAGES = {".html", ".htm"}
_GRAPHS = {".safetensors", ".json", ".pt"}

_LIST = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>body { font: 15px/1.7 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto;
padding: 0 1rem } h1 { font-size: 1.2rem; overflow-wrap: anywhere } small { opacity: .7 }</style>
</head><body><h1>$title</h1>$body</body></html>
""")


class Viewer(ThreadingHTTPServer):
    """The server; ``serve_forever`` runs it and ``server_close`` ends it.

    Args:
        path: A folder, a feature bundle, a graph file or a page. Of a file, its folder is served
            and ``url`` leads to the file.
        port: Where to listen; 0: any free port.
        features: A bundle, for what the graph pages say about features.

    Raises:
        InputError: No such path, something that cannot be shown, or the port is taken.
    """

    daemon_threads = True

    def __init__(
        self, path: str | Path, port: int = 0, features: FeatureBundle | None = None
    ) -> None:
        target = Path(path).resolve()
        if not target.exists():
            raise InputError(f"there is no file or folder {path}")
        if target.is_file() and target.suffix.lower() not in _PAGES | _GRAPHS:
            known = ", ".join(sorted(_PAGES | _GRAPHS))
            raise InputError(f"{path} cannot be shown: it is none of {known}")
        self.root = target if target.is_dir() else target.parent
        self.features = features
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot listen on port {port}: {error}") from error
        name = "" if target.is_dir() else quote(target.name)
        self.url = f"http://127.0.0.1:{self.server_port}/{name}"

    def page(self, name: str) -> bytes | None:
        """What is shown for a path below the folder, or None if there is nothing.

        Raises:
            TranscoderError: It is a damaged file.
        """
        path = (self.root / name).resolve()
        # Neither ".." nor a link leads out, and hidden files are not shown.
        if not path.is_relative_to(self.root) or not path.exists():
            return None
        if any(part.startswith(".") for part in path.relative_to(self.root).parts):
            return None
        if path.is_dir():
            if (path / INDEX).is_file():
                return FeatureBundle.open(path).to_html().encode("utf-8", "replace")
            return self._listing(path)
        shown = _SHOWN.get(path.suffix.lower())
        return None if shown is None else shown(path, self.features)

    def _listing(self, folder: Path) -> bytes:
        rows = []
        for path in sorted(folder.iterdir(), key=lambda p: (p.is_file(), p.name)):
            kind = _kind(path)
            inside = path.resolve().is_relative_to(self.root)
            if kind and inside and not path.name.startswith("."):
                name = path.name + ("/" if path.is_dir() else "")
                rows.append(
                    f'<li><a href="{quote(name)}">{html.escape(name)}</a> <small>{kind}</small>'
                )
        listed = f"<ul>{''.join(rows)}</ul>" if rows else "<p>Nothing here can be shown.</p>"
        title = html.escape(str(folder.relative_to(self.root.parent)))
        return _LIST.substitute(title=title, body=listed).encode("utf-8", "replace")


def _kind(path: Path) -> str:
    if path.is_dir():
        return "features" if (path / INDEX).is_file() else "folder"
    suffix = path.suffix.lower()
    return "page" if suffix in _PAGES else "graph" if suffix in _GRAPHS else ""


def _html_file(path: Path, features: FeatureBundle | None) -> bytes:
    del features
    return path.read_bytes()


def _graph(read: Callable[[Path], AttributionGraph]) -> Callable[..., bytes]:
    def shown(path: Path, features: FeatureBundle | None) -> bytes:
        graph = read(path)
        details = features.details(graph) if features else None
        return render_graph(graph, feature_details=details).encode("utf-8", "replace")

    return shown


_SHOWN: dict[str, Callable[[Path, FeatureBundle | None], bytes]] = {
    **dict.fromkeys(_PAGES, _html_file),
    ".safetensors": _graph(AttributionGraph.load),
    ".json": _graph(AttributionGraph.from_circuit_tracer),
    ".pt": _graph(AttributionGraph.from_circuit_tracer),
}


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; every other method is answered with 501."""

    server: Viewer
    server_version = "nnsight-transcoders"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in ("127.0.0.1", "localhost"):
            return self.send_error(403, "Only for this machine")
        name = unquote(urlsplit(self.path).path)
        try:
            page = None if "\0" in name else self.server.page(name.lstrip("/"))
        except (TranscoderError, OSError) as error:
            text = html.escape(str(error))
            page = _LIST.substitute(title="This cannot be shown", body=f"<p>{text}</p>").encode()
            return self._send(500, page, body)
        if page is None:
            return self.send_error(404, "Not found")
        if (self.server.root / name.lstrip("/")).is_dir() and not name.endswith("/"):
            self.send_response(301)
            self.send_header("Location", quote(name) + "/")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self._send(200, page, body)

    def _send(self, status: int, page: bytes, body: bool) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(page)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Nothing is printed for each request."""

"""A loopback server that speaks the part of the Hub's HTTP API that checkpoints need.

Repositories are dictionaries in memory, every upload makes a commit, and every request is kept in
``requests``, so a test can say what was asked for and how many bytes were sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"


@dataclass
class Repo:
    """One repository: commits (sha -> files), branches, and who may see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; returns the new commit."""
        content = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(content)}".encode()).hexdigest()
        self.commits[sha] = content
        self.refs[branch] = sha
        return sha


@dataclass
class Request:
    """One request: method, path without the query, bytes of the answer's body, headers."""

    method: str
    path: str
    sent: int
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with requests for some paths.

    Attributes:
        path: Regular expression for the path.
        status: Answered instead; 0: the connection is cut in the middle of the answer.
        times: How often; then all is well again.
        method: Only requests of this kind.
    """

    path: str
    status: int
    times: int = 1
    method: str = "GET"


class HubServer:
    """The server's state. Start it with ``running()``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.url = ""
        self.down = False
        self.faults: list[Fault] = []

    def add(self, repo_id: str, files: dict[str, bytes], **about: Any) -> Repo:
        """Make a repository with one commit on ``main``."""
        repo = self.repos[repo_id] = Repo(**about)
        repo.commit(files)
        return repo

    def downloads(self) -> dict[str, int]:
        """File -> bytes sent, for every file whose content was asked for."""
        found: dict[str, int] = {}
        for request in self.requests:
            match = re.match(r"^/[^/]+/[^/]+/resolve/[^/]+/(.+)$", request.path)
            if match and request.method == "GET":
                found[unquote(match[1])] = found.get(unquote(match[1]), 0) + request.sent
        return found

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits a request, counted down."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    @contextmanager
    def running(self, port: int = 0) -> Iterator[HubServer]:
        """Serve on a loopback port (0: any free one) until the block ends."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    cut = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send an answer; header names are given with ``_`` for ``-``."""
        path = urlsplit(self.path).path
        sent = 0 if self.command == "HEAD" else len(body)
        self.hub.requests.append(Request(self.command, path, sent, dict(self.headers)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, data: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(data).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.handle_request(b"")

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self.handle_request(self.body())

    do_PUT = do_POST

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path)
        if self.hub.down or (fault and fault.status):
            return self.answer(fault.status if fault else 503)
        self.cut = fault is not None
        routes = (
            (r"^/api/models/([^/]+/[^/]+)(?:/revision/(.+))?$", self.info),
            (r"^/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", self.file),
            (r"^/api/models/([^/]+/[^/]+)/tree/([^/]+)/(.+)$", self.folder),
            (r"^/api/repos/create$", self.create),
            (r"^/api/models/([^/]+/[^/]+)/branch/(.+)$", self.branch),
            (r"^/api/validate-yaml$", self.fine),
            (r"^/api/models/([^/]+/[^/]+)/preupload/(.+)$", self.preupload),
            (r"^/([^/]+/[^/]+)\.git/info/lfs/objects/batch$", self.lfs_batch),
            (r"^/lfs/([0-9a-f]+)$", self.lfs_put),
            (r"^/api/models/([^/]+/[^/]+)/commit/(.+)$", self.commit),
        )
        for pattern, route in routes:
            if match := re.match(pattern, path):
                return route(body, *match.groups())
        return self.answer(404)

    # -- reading ---------------------------------------------------------------------------------

    def find(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; answers the refusal itself."""
        repo = self.hub.repos.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            return self.refuse(401 if not known else 404, "RepoNotFound")
        if repo.gated and not known:
            return self.refuse(403, "GatedRepo")
        sha = repo.refs.get(revision or "main", revision or "")
        if sha not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def info(self, _body: bytes, repo_id: str, revision: str | None) -> None:
        found = self.find(repo_id, revision)
        if found:
            sha, files = found
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"id": repo_id, "sha": sha, "siblings": siblings})

    def file(self, _body: bytes, repo_id: str, revision: str, name: str) -> None:
        found = self.find(repo_id, revision)
        if not found:
            return None
        sha, files = found
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        if wanted:
            part = data[int(wanted[1]) : int(wanted[2] or len(data)) + 1]
            start = int(wanted[1])
            headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
            return self.answer(206, part, **headers)
        return self.answer(200, data, **headers)

    def folder(self, _body: bytes, _repo_id: str, _revision: str, _path: str) -> None:
        """No repository here has folders that anyone lists (transformers looks for one)."""
        self.refuse(404, "EntryNotFound")

    # -- writing ---------------------------------------------------------------------------------

    def fine(self, _body: bytes) -> None:
        self.answer_json({})

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401)
        return False

    def create(self, body: bytes) -> None:
        if not self.allowed():
            return None
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200:
            repo = self.hub.add(repo_id, {".gitattributes": b""})
            repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self.answer_json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id}, status)

    def branch(self, _body: bytes, repo_id: str, name: str) -> None:
        repo = self.hub.repos[repo_id]
        status = 409 if name in repo.refs else 200
        repo.refs.setdefault(name, repo.refs["main"])
        self.answer_json({}, status)

    def preupload(self, body: bytes, _repo_id: str, _revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.answer_json({"files": modes})

    def lfs_batch(self, body: bytes, _repo_id: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if not self.allowed():
            return
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        pull = "create_pr" in parse_qs(urlsplit(self.path).query)
        sha = self.hub.repos[repo_id].commit(files, "refs/pr/1" if pull else revision)
        url = f"{self.hub.url}/{repo_id}"
        self.answer_json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{url}/commit/{sha}",
                "pullRequestUrl": f"{url}/discussions/1" if pull else None,
            }
        )

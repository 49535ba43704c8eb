"""A hub on the loopback: Hugging Face's and ModelScope's requests, answered well or as badly as a test wants."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Files = dict[str, bytes]


@dataclass
class Fault:
    """What goes wrong with one answer to a request for a file. The fields not given go right."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    keep_bytes: int | None = None
    """Break the connection after that many bytes of the body."""
    without_length: bool = False
    """Announce no length, so that a short body looks whole."""
    ignore_range: bool = False
    content_range: str | None = None
    body: bytes | None = None
    then: Callable[[], None] | None = None
    """Called when the body, or what was kept of it, has been sent."""


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    target: str
    headers: dict[str, str]


class StubHub:
    """`repos` maps ids to files. `faults` maps file paths (or `api`) to faults, one for each answer until used up."""

    def __init__(self) -> None:
        self.repos: dict[str, Files] = {}
        self.listed: dict[str, list[dict[str, Any]]] = {}
        """Ready-made lists of files that replace the true ones."""
        self.about: dict[str, Any] = {"license": "other", "license_name": "test-licence", "license_link": "LICENSE.md"}
        self.gated: str | bool = False
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.redirect_to: str | None = None
        self.asked: list[Asked] = []
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ranges(self, path: str) -> list[str | None]:
        """The `Range` of each request for a file, in order."""
        return [a.headers.get("range") for a in self.asked if unquote(a.target).endswith((f"/{path}", f"={path}"))]

    def downloads(self) -> list[str]:
        """Targets of the requests for files."""
        return [a.target for a in self.asked if "/resolve/" in a.target or "FilePath=" in a.target]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def huggingface_entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if path.endswith((".safetensors", ".gguf", ".bin")):
        entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def modelscope_entry(path: str, data: bytes) -> dict[str, Any]:
    return {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(data), "Sha256": sha256(data)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that break off are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.asked.append(Asked(self.path, {k.lower(): v for k, v in self.headers.items()}))
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        if found := re.fullmatch(r"/api/models/(.+?/.+?)/revision/.+", path):
            self._list(found[1], self._huggingface)
        elif found := re.fullmatch(r"/api/v1/models/(.+?/.+?)/repo/files", path):
            self._list(found[1], self._modelscope_files)
        elif found := re.fullmatch(r"/api/v1/models/(.+?/.+?)/repo", path):
            self._file(found[1], query["FilePath"])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)", path):
            self._list(found[1], lambda _repo: {"Code": 200, "Data": {"License": "test-licence"}})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(found[1], found[2])
        else:
            self._send(404, {}, b"no such page")

    def _list(self, repo: str, answer: Callable[[str], dict[str, Any]]) -> None:
        fault = self.hub.faults["api"].pop(0) if self.hub.faults["api"] else Fault()
        if fault.status or fault.body is not None:
            self._send(fault.status or 200, fault.headers, fault.body or b"")
        elif repo not in self.hub.repos:
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}")
        else:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(answer(repo)).encode())

    def _huggingface(self, repo: str) -> dict[str, Any]:
        listed = self.hub.listed.get(repo) or [huggingface_entry(p, d) for p, d in self.hub.repos[repo].items()]
        return {"id": repo, "sha": COMMIT, "gated": self.hub.gated, "cardData": self.hub.about, "siblings": listed}

    def _modelscope_files(self, repo: str) -> dict[str, Any]:
        listed = self.hub.listed.get(repo) or [modelscope_entry(p, d) for p, d in self.hub.repos[repo].items()]
        return {"Code": 200, "Success": True, "Data": {"Files": [{"Path": "vae", "Type": "tree"}, *listed]}}

    def _file(self, repo: str, path: str) -> None:
        if self.hub.redirect_to:
            self._send(302, {"Location": self.hub.redirect_to + self.path}, b"")
            return
        fault = self.hub.faults[path].pop(0) if self.hub.faults[path] else Fault()
        data = self.hub.repos[repo][path] if fault.body is None else fault.body
        status, headers, body = 200, {}, data
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if ranged and not fault.ignore_range:
            start = int(ranged[1])
            body, status = data[start:], 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault.content_range:
            headers["Content-Range"] = fault.content_range
        self._send(fault.status or status, {**headers, **fault.headers}, body, fault)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        fault = fault or Fault()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.without_length:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body if fault.keep_bytes is None else body[: fault.keep_bytes])
            self.wfile.flush()
        except OSError:
            pass  # the client has gone
        if fault.keep_bytes is not None:
            self.close_connection = True
        if fault.then:
            fault.then()

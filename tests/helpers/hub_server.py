"""A hub on the loopback interface: what huggingface_hub asks of the real one, for files held in memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]

_INFO = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def commit(name: str, revision: str) -> str:
    """The commit that a branch of a repository stands at."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def folder_files(folder: Path) -> Files:
    """All files of a folder, by their path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(kw_only=True)
class HubServer:
    """A stand-in for the hub: the files that it holds, and the requests that it got.

    Attributes:
        repos: files by id and branch.
        gated: ids whose files, though not their listings, need `token`.
        status: what every request is answered with, where not None.
        cut: how many more downloads break off halfway.
        asked: method, path and Authorization header of each request.
    """

    repos: dict[str, dict[str, Files]]
    url: str = ""
    gated: set[str] = field(default_factory=set)
    token: str = "hf_loopback"
    status: int | None = None
    cut: int = 0
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    @property
    def fetched(self) -> set[str]:
        """The files, by their path in the repository, whose bytes were asked for."""
        found = (_FILE.fullmatch(path) for method, path, _ in self.asked if method == "GET")
        return {match["file"] for match in found if match}


@contextmanager
def serving(repos: Mapping[str, Mapping[str, Files]]) -> Iterator[HubServer]:
    """Run a hub until the block ends."""
    hub = HubServer(repos={name: dict(branches) for name, branches in repos.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers["Authorization"]))
            match = _TREE.fullmatch(path) or _INFO.fullmatch(path) or _FILE.fullmatch(path)
            if hub.status is not None:
                return self.send(hub.status, b"")
            if match is None or match["id"] not in hub.repos:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            name, wanted = match["id"], match["revision"] or "main"
            branches = hub.repos[name]
            found = [branch for branch in branches if wanted in (branch, commit(name, branch))]
            if not found:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files, sha = branches[found[0]], commit(name, found[0])
            if match.re is _INFO:
                siblings = [{"rfilename": file} for file in files]
                return self.send(200, json.dumps({"id": name, "sha": sha, "siblings": siblings}).encode())
            if match.re is _TREE:
                return self.send(200, json.dumps([entry(file, data) for file, data in files.items()]).encode())
            if name in hub.gated and self.headers["Authorization"] != f"Bearer {hub.token}":
                return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
            data = files.get(match["file"])
            if data is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            headers = {"X-Repo-Commit": sha, "ETag": f'"{entry("", data)["oid"]}"', "Accept-Ranges": "bytes"}
            start = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if start is None:
                return self.send(200, data, headers)
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.send(206, data[first:], headers)

        def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut and status in (200, 206) and headers:
                hub.cut -= 1
                self.close_connection = True
                body = body[: len(body) // 2]
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: str, data: bytes) -> dict[str, Any]:
    """One line of a repository's listing."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}

"""A hub on the loopback interface: what huggingface_hub asks of the real one, uploads too, for files held in memory."""

from __future__ import annotations

import base64
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
_PREUPLOAD = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/main")
_COMMIT = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/commit/main")
_BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
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
        private: ids that nobody else sees.
        commits: files of each upload, by id.
        refused: what a write is answered with, by a part of its path.
        objects: contents of large files, by their SHA-256.
    """

    repos: dict[str, dict[str, Files]]
    url: str = ""
    gated: set[str] = field(default_factory=set)
    token: str = "hf_loopback"
    status: int | None = None
    cut: int = 0
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

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

        def do_POST(self) -> None:
            self.write()

        def do_PUT(self) -> None:
            self.write()

        def write(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.asked.append((self.command, path, self.headers["Authorization"]))
            refused = next((status for part, status in hub.refused.items() if part in path), hub.status)
            if refused is not None:
                return self.send(refused, b"{}")
            if not path.startswith("/objects/") and self.headers["Authorization"] != f"Bearer {hub.token}":
                return self.send(401, b"{}")
            return self.send(*written(hub, path, body))

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
                about = {"id": name, "sha": sha, "siblings": siblings, "private": name in hub.private}
                return self.send(200, json.dumps(about).encode())
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


def written(hub: HubServer, path: str, body: bytes) -> tuple[int, bytes]:
    """What a write is answered with: a new repository, a card, the kind of an upload, a large file, a commit."""

    def answer(content: Any) -> tuple[int, bytes]:
        return 200, json.dumps(content).encode()

    if path.startswith("/objects/"):
        oid = path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        hub.objects[oid] = body
        return 200, b""
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in hub.repos:
            return 409, json.dumps({"error": "You already created it", "url": f"{hub.url}/{name}"}).encode()
        hub.repos[name] = {"main": {}}
        if asked.get("visibility") == "private":
            hub.private.add(name)
        return answer({"url": f"{hub.url}/{name}", "id": name})
    if path == "/api/validate-yaml":
        return answer({"errors": [], "warnings": []})
    if match := _PREUPLOAD.fullmatch(path):
        files = [
            {"path": file["path"], "uploadMode": kind(file["path"]), "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        return answer({"files": files})
    if match := _BATCH.fullmatch(path):
        objects = [
            {**each, "actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        return answer({"transfer": "basic", "objects": objects})
    match = _COMMIT.fullmatch(path)
    assert match is not None, path
    lines = [json.loads(line) for line in body.splitlines()]
    files = hub.repos[match["id"]]["main"]
    names = []
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        names += [value["path"]] if "path" in value else []
    hub.commits.append((match["id"], names))
    return answer({"commitUrl": f"{hub.url}/{match['id']}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None})


def kind(file: str) -> str:
    """How the hub wants a file: weights as large files, all else inside the commit."""
    return "lfs" if file.endswith(".safetensors") else "regular"

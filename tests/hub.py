"""A stand-in of the hub on 127.0.0.1 that its own client talks to: repositories, commits, LFS uploads, downloads."""

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
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]


@dataclass
class Hub:
    """What it holds, and what it was asked.

    Attributes:
        address: of it.
        token: that every request has to bring; any where it is empty.
        repos: name to its commits, the newest last: sha to files.
        private: names of repositories that were made so.
        asked: method and path of each request.
        blobs: what was uploaded by LFS, by sha256.
    """

    address: str = ""
    token: str = ""
    repos: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def files(self, repo: str) -> Files:
        """As the newest commit has them."""
        return list(self.repos[repo].values())[-1] if self.repos[repo] else {}

    def commit(self, repo: str, files: Files) -> str:
        """Make it what a repository holds; returns its sha."""
        content = repr((len(self.repos[repo]), sorted(files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.repos[repo][sha] = files
        return sha


@contextmanager
def running_hub(token: str = "") -> Iterator[Hub]:
    """A hub that answers while this is open."""
    hub = Hub(token=token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def reached_hub(monkeypatch: pytest.MonkeyPatch, token: str) -> Iterator[Hub]:
    """A hub that the client asks in this process, with this token, by LFS: it stores no chunks, as Xet's does."""
    with running_hub(token) as hub:
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setenv("HF_TOKEN", token)
        for name, value in {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        brought = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.token and not brought and not path.startswith("/lfs/"):
            return self._send(401, {"error": "Invalid username or password."})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *found.groups())
        return self._send(404, {"error": f"no route {path}"})

    def _send(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        answer = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", **answer})
        self.hub.repos[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self._send(200, answer)

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self._send(200, {"warnings": [], "errors": []})

    def preupload(self, body: bytes, repo: str) -> None:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
            for one in json.loads(body)["files"]
        ]
        self._send(200, {"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        wanted = [one for one in json.loads(body)["objects"] if one["oid"] not in self.hub.blobs]
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}", "header": {}}}}
            for one in wanted
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str) -> None:
        files = dict(self.hub.files(repo))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = self.hub.commit(repo, files)
        self._send(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def _files(self, repo: str, revision: str) -> tuple[str, Files] | None:
        commits = self.hub.repos.get(repo, {})
        sha = list(commits)[-1] if revision == "main" and commits else revision
        return (sha, commits[sha]) if sha in commits else None

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if repo not in self.hub.repos:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        found = self._files(repo, revision or "main")
        if found is None and revision is not None:
            return self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        sha, files = found or (None, {})
        return self._send(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self._files(repo, revision)
        files = found[1] if found else {}
        self._send(
            200,
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ],
        )

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        found = self._files(repo, revision)
        if found is None or name not in found[1]:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        sha, files = found
        return self._send(200, files[name], ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"', X_Repo_Commit=sha)


REPO = r"([\w-]+/[\w-]+)"
ROUTES = (
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (f"POST /api/models/{REPO}/preupload/main", _Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", _Handler.lfs_put),
    (f"POST /api/models/{REPO}/commit/main", _Handler.commit),
    (f"GET /api/models/{REPO}", _Handler.info),
    (f"GET /api/models/{REPO}/revision/([^/]+)", _Handler.info),
    (f"GET /api/models/{REPO}/tree/([^/]+)", _Handler.tree),
    (f"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
)

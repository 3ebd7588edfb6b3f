"""The hub's interface on 127.0.0.1, with its faults: for tests through the real client."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
TOKEN = "hf_of_the_tests"
EXPIRED_TOKEN = "hf_expired"
READ_TOKEN = "hf_that_may_only_read"


@dataclasses.dataclass
class Fault:
    """Something that goes wrong with a file for some requests.

    Attributes:
        name: End of the paths that it concerns.
        method: ``HEAD`` or ``GET``, ``""`` for both.
        times: For how many requests.
        status: Answer with this status instead of the file.
        cut: Close the connection after so many bytes of the body.
        reset: Whether to close it with a reset, as a broken network does, instead of properly.
        damage: Change a byte of the body.
        drop: Leave out so many bytes at the end of the body, and say that the rest is all.
        delay: Seconds to wait before the body.
    """

    name: str
    method: str = "GET"
    times: int = 1
    status: int = 0
    cut: int | None = None
    reset: bool = False
    damage: bool = False
    drop: int = 0
    delay: float = 0.0


class Hub:
    """Serves ``folder/repo@revision/file`` as the hub does.

    Small files have a git hash as ETag. Weights are large files: the hub redirects to its store,
    and says their SHA-256 and size in headers of the redirect.

    Attributes:
        requests: Method, path and whether the right token was sent, of every request.
        ranges: The ``Range`` headers of the requests that had one.
        faults: What goes wrong next.
        headers: Added to what is said about large files.
        storage: Address of the storage service Xet that tokens are given out for, ``""``: none.
        commits: What was committed: repository, message, paths of the files.
        objects: Large files that were uploaded, by SHA-256, committed or not.
        private: Repositories that were created as private ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str, bool]] = []
        self.ranges: list[str] = []
        self.faults: list[Fault] = []
        self.headers: dict[str, str] = {}
        self.storage = ""
        self.commits: list[tuple[str, str, list[str]]] = []
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.store = f"http://localhost:{port}/store"  # another host, which is not sent the token
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """Forgets the requests so far and the faults to come."""
        self.requests.clear()
        self.ranges.clear()
        self.faults.clear()
        self.headers.clear()
        self.storage = ""
        self.commits.clear()
        self.objects.clear()

    def downloads(self, name: str) -> int:
        """How often a file's content was asked for."""
        return sum(m == "GET" and path.endswith("/" + name) for m, path, _ in self.requests)

    def fault(self, method: str, path: str) -> Fault:
        """What goes wrong with a request; a fault without fields is none."""
        for fault in self.faults:
            if path.endswith(fault.name) and fault.method in ("", method) and fault.times:
                fault.times -= 1
                return fault
        return Fault("")


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        self.write_request()

    def do_PUT(self) -> None:
        self.write_request()

    def fail(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        self.send_response(status)
        said = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        for header, value in said.items():
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bool) -> None:
        hub, sent = self.hub, self.headers.get("Authorization")
        authorised = sent == f"Bearer {TOKEN}"
        hub.requests.append((self.command, self.path, authorised))
        fault = hub.fault(self.command, self.path)
        if fault.status:
            return self.fail(fault.status)
        stored = re.fullmatch(r"/store/([\w-]+/[\w.-]+)/([^/]+)/(.+)", self.path)
        if stored:
            repo, revision, name = stored.groups()
            content = (hub.folder / f"{repo}@{revision}" / name).read_bytes()
            return self.send_content(content, fault) if body else self.fail(404)
        model = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)", self.path)
        if model:
            return self.send_model(model[1], authorised)
        match = re.fullmatch(r"/([\w-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
        if "/xet-read-token/" in self.path and hub.storage:
            return self.send_storage_token()
        if not match:
            return self.fail(404)
        repo, revision, name = match.groups()
        revision = {c: r for r, c in COMMITS.items()}.get(revision, revision)
        if sent == f"Bearer {EXPIRED_TOKEN}":
            return self.fail(401, message="Invalid credentials in Authorization header")
        if not (hub.folder / f"{repo}@main").is_dir():
            return self.fail(401, "RepoNotFound", "Repository not found")
        if "private" in repo and not authorised:
            return self.fail(401, "RepoNotFound", "Repository not found")
        if "gated" in repo and not authorised:
            return self.fail(403, "GatedRepo", "Access to model is restricted")
        folder = hub.folder / f"{repo}@{revision}"
        if not folder.is_dir():
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        if not (folder / name).is_file():
            # With the commit the client notes that the file is not there.
            return self.fail(404, "EntryNotFound", "Entry not found", COMMITS[revision])
        content = (folder / name).read_bytes()
        if name.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", f"{hub.store}/{repo}/{revision}/{name}")
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", COMMITS[revision])
            for header, value in hub.headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def send_storage_token(self) -> None:
        self.send_response(200)
        self.send_header("X-Xet-Cas-Url", self.hub.storage)
        self.send_header("X-Xet-Access-Token", "token")
        self.send_header("X-Xet-Token-Expiration", str(int(time.time()) + 3600))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_content(self, content: bytes, fault: Fault) -> None:
        start = 0
        if "Range" in self.headers:
            self.hub.ranges.append(self.headers["Range"])
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if fault.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        content = content[: len(content) - fault.drop]
        self.send_response(206 if start else 200)
        if start:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        time.sleep(fault.delay)
        if fault.cut is None:
            self.wfile.write(content[start:])
            return
        self.wfile.write(content[start : start + fault.cut])
        self.wfile.flush()
        if fault.reset:
            time.sleep(0.2)  # let the client read what was sent
            option = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            self.connection.close()
        self.close_connection = True

    def send_json(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_model(self, repo: str, authorised: bool) -> None:
        folder = self.hub.folder / f"{repo}@main"
        if not folder.is_dir() or (repo in self.hub.private and not authorised):
            return self.fail(401, "RepoNotFound", "Repository not found")
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": repo, "private": repo in self.hub.private, "siblings": siblings}
        return self.send_json({**facts, "sha": COMMITS["main"], "tags": [], "downloads": 0})

    def write_request(self) -> None:
        """Creating a repository and committing to it, large files through the store."""
        hub, sent = self.hub, self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        hub.requests.append((self.command, path, sent == f"Bearer {TOKEN}"))
        fault = hub.fault(self.command, path)
        if fault.status:
            return self.fail(fault.status)
        stored = re.fullmatch(r"/store/upload/([0-9a-f]{64})", path)
        if stored:
            # The address is signed, so there is no token; the store checks what it gets.
            if hashlib.sha256(body).hexdigest() != stored[1]:
                return self.fail(400)
            hub.objects[stored[1]] = body
            return self.send_json({})
        if sent == f"Bearer {READ_TOKEN}":
            return self.fail(403, message="You don't have the rights to create a model")
        if sent != f"Bearer {TOKEN}":
            return self.fail(401, message="Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        batch = re.fullmatch(r"/([\w-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)
        if batch:
            return self.send_uploads(json.loads(body))
        match = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)/(preupload|commit)/main", path)
        if not match or not (hub.folder / f"{match[1]}@main").is_dir():
            return self.fail(404, "RepoNotFound", "Repository not found")
        if match[2] == "commit":
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.send_json({"files": modes})

    def create(self, wish: dict[str, Any]) -> None:
        repo = f"{wish['organization']}/{wish['name']}"
        address = {"url": f"{self.hub.endpoint}/{repo}"}
        if (self.hub.folder / f"{repo}@main").is_dir():
            return self.send_json({**address, "error": "You already created this model repo"}, 409)
        (self.hub.folder / f"{repo}@main").mkdir(parents=True)
        if wish.get("private") or wish.get("visibility") == "private":
            self.hub.private.add(repo)
        return self.send_json(address)

    def send_uploads(self, wish: dict[str, Any]) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.store}/upload/{o['oid']}"}}}
            for o in wish["objects"]
        ]
        return self.send_json({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        hub, header = self.hub, lines[0]["value"]
        if header.get("parentCommit", COMMITS["main"]) != COMMITS["main"]:
            return self.fail(412, message="A commit has happened since")
        contents: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            contents[value["path"]] = (
                base64.b64decode(value["content"])
                if line["key"] == "file"
                else hub.objects[value["oid"]]
            )
        for name, content in contents.items():
            file = hub.folder / f"{repo}@main" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        hub.commits.append((repo, header["summary"], sorted(contents)))
        address = f"{hub.endpoint}/{repo}/commit/{COMMITS['main']}"
        return self.send_json({"commitUrl": address, "commitOid": COMMITS["main"]})

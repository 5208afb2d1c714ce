"""A small Hugging Face hub on a loopback port: repositories, downloads, uploads, and faults on demand.

It answers what `huggingface_hub` and `datasets` ask on the paths the program takes, with the status codes and headers
of the real one. Anything else is refused (501) and noted in `FakeHub.unexpected`, which a test looks at. Weights are
kept as the hub keeps them: a file's own address redirects to a store on another host name, where no token belongs.

To answer one more request, write a method of `_Handler` and add a line to `ROUTES`.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

LARGE_FILES = ("*.safetensors", "*.bin", "*.parquet")
"""Kept in the store of large files."""

WRITER, READER = "hf_writerToken0123456789", "hf_readerToken0123456789"


@dataclass(frozen=True)
class User:
    """Who a token belongs to."""

    name: str
    role: str
    """The token's: read, write or fineGrained."""
    organisations: tuple[str, ...] = ()


@dataclass
class Repository:
    """One repository: its commits, its branches and tags, and who may see it."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        """Make `files` the branch's content; returns the commit."""
        digests = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())
        commit = hashlib.sha1(repr((self.refs.get(branch), digests)).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        self.messages.append(message)
        return commit

    @property
    def files(self) -> Files:
        """What the main branch holds."""
        return self.commits[self.refs["main"]]


@dataclass(frozen=True)
class Request:
    """One request the hub got."""

    method: str
    path: str
    token: str | None
    range: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Answer:
    """What is sent."""

    status: int
    content: bytes
    headers: dict[str, str]

    def but(self, *, status: int | None = None, content: bytes | None = None, **headers: str) -> Answer:
        """The same with something else in it; of a header's name, `_` stands for a hyphen."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(status or self.status, self.content if content is None else content, {**self.headers, **named})


@dataclass
class Fault:
    """What happens to requests that match, instead of their answer."""

    pattern: str
    """A regular expression, searched in "METHOD /path", or "METHOD /path bytes=first-last"."""
    times: int
    """How many requests it happens to."""
    status: int | None = None
    """An HTTP error of this code."""
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    stall: threading.Event | None = None
    """Send half of the file and wait for this; with none of these, send half and hang up."""
    lie: Callable[[Answer], Answer] | None = None
    """Send this in place of the answer."""
    seen: threading.Event = field(default_factory=threading.Event)
    """Set when it has happened."""


class FakeHub:
    """The hub's state, and the server that shows it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users = {WRITER: User("me", "write", ("team",)), READER: User("me", "read")}
        self.store: Files = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        """Bytes of bodies that were sent, for each path."""
        self.counting = threading.Lock()
        self.unexpected: list[str] = []
        self.all_regular = False
        """Whether uploads are asked for as ordinary files, whatever their size."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.endpoint, self.store_address = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def add(self, identifier: str, content: Files | Path, *, kind: str = "model", **about: Any) -> Repository:
        """Put a repository with one commit there; `content` is its files or a folder."""
        repository = Repository(kind, identifier, **about)
        repository.commit(read_folder(content) if isinstance(content, Path) else content)
        self.repositories[kind, identifier] = repository
        return repository

    def model(self, identifier: str) -> Repository:
        """A model repository."""
        return self.repositories["model", identifier]

    def fail(self, pattern: str, times: int = 1, **what: Any) -> Fault:
        """Let requests go wrong."""
        self.faults.append(Fault(pattern, times, **what))
        return self.faults[-1]

    def fetched(self) -> set[str]:
        """The files that were downloaded, as `id/file`."""
        found = (re.fullmatch(r"/(?:datasets/|spaces/)?(.+)/resolve/[^/]+/(.+)", r.path) for r in self.requests)
        return {f"{match[1]}/{match[2]}" for match in found if match}

    def forget_requests(self) -> None:
        """Start the list of requests, and the count of what is sent, anew."""
        self.requests.clear()
        self.sent.clear()

    def sent_of(self, identifier: str, pattern: str = "*.safetensors") -> int:
        """Bytes that were sent of a model's large files."""
        files = self.model(identifier).files
        return sum(self.sent[f"/store/{_sha256(files[name])}"] for name in fnmatch.filter(files, pattern))

    @contextmanager
    def serve(self) -> Iterator[FakeHub]:
        """Answer while the context lasts."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for fault in self.faults:
                if fault.stall:
                    fault.stall.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """What a process needs to talk to this hub, with its cache in `home`."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        # The other transfer protocol needs a storage server of its own kind.
        rest = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HUGGING_FACE_HUB_TOKEN": ""}
        return {**own, **rest, "HF_TOKEN": token or ""}


def read_folder(folder: Path) -> Files:
    """Every file below a folder, name → bytes."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _is_large(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in LARGE_FILES)


@lru_cache(16)  # a large file is asked for by many ranges
def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(16)
def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": _git_id(content), "size": len(content), "path": name}
    if _is_large(name):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _sibling(entry: dict[str, Any]) -> dict[str, Any]:
    """A file as a model's description lists it, which names the same things otherwise."""
    large = {"lfs": {"sha256": entry["lfs"]["oid"], **entry["lfs"]}} if "lfs" in entry else {}
    return {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"], **large}


def _entries(files: Files, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders below `folder`, as the hub lists them."""
    prefix = f"{folder}/" if folder else ""
    below = {name: content for name, content in files.items() if name.startswith(prefix)}
    parents = {parent.as_posix() for name in below for parent in Path(name).parents if parent.as_posix() != "."}
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in parents if p.startswith(prefix)]
    entries += [_tree_entry(name, content) for name, content in below.items()]
    return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(prefix)]


class _Refusal(Exception):
    """An answer with an error code.

    Args:
        status: The HTTP status.
        code: The hub's name of the error, such as RepoNotFound.
        message: What it says.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits until the header before it is acknowledged, for 40 ms

    def _answer(self) -> None:
        """Find the request's route and send what it returns, or the fault in its place."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, url.path, self.token, self.headers.get("Range"))
        self.hub.requests.append(request)
        self.fault = self._fault(f"{request} {request.range}" if request.range else str(request))
        if self.fault and self.fault.status:
            return self._send_json(self.fault.body, self.fault.status, self.fault.headers)
        try:
            self._route(str(request))
        except _Refusal as refusal:
            self._send_json({"error": refusal.message}, refusal.status, refusal.headers)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 - the names http.server looks for

    def _route(self, line: str) -> None:
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, line):
                return handler(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        self.hub.unexpected.append(line)
        raise _Refusal(501, "", "this hub does not know that request")

    def _fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                fault.seen.set()
                return fault
        return None

    def log_message(self, *_: object) -> None:
        """Say nothing; tests read stderr."""

    # --- who asks, and for what ---

    def _user(self) -> User | None:
        if self.token is not None and self.token not in self.hub.users:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.users.get(self.token or "")

    def _repository(self, kind: str, identifier: str) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get((kind, identifier))
        owners = {user.name, *user.organisations} if user else set()
        if repository is None or (repository.private and identifier.split("/")[0] not in owners):
            raise _Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision or "main", revision)
        if commit not in repository.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _may_write(self, namespace: str) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "", "Invalid username or password.")
        if user.role == "read" or namespace not in {user.name, *user.organisations}:
            raise _Refusal(403, "", f'You don\'t have the rights to create a model under the namespace "{namespace}"')

    # --- reading ---

    def info(self, kind: str, id: str, revision: str) -> None:
        repository = self._repository(kind, id)
        commit = self._commit(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        if "blobs" in self.query:
            entries = (_tree_entry(name, content) for name, content in repository.commits[commit].items())
            siblings = [_sibling(entry) for entry in entries]
        about = {"id": id, "sha": commit, "private": repository.private, "gated": repository.gated}
        self._send_json({**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, kind: str, id: str, revision: str, folder: str) -> None:
        repository = self._repository(kind, id)
        files = repository.commits[self._commit(repository, revision)]
        entries = _entries(files, folder, recursive=self.query.get("recursive") in (["true"], ["True"]))
        if folder and not entries:
            raise _Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self._send_json(entries)

    def paths_info(self, kind: str, id: str, revision: str) -> None:
        repository = self._repository(kind, id)
        files = repository.commits[self._commit(repository, revision)]
        entries = {entry["path"]: entry for entry in _entries(files, "", recursive=True)}
        self._send_json([entries[path] for path in json.loads(self.body)["paths"] if path in entries])

    def resolve(self, kind: str, id: str, revision: str, name: str) -> None:
        repository = self._repository(kind, id)
        if repository.gated:
            raise _Refusal(403 if self.token else 401, "GatedRepo", f"Access to model {id} is restricted")
        commit = self._commit(repository, revision)
        content = repository.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            refusal = _Refusal(404, "EntryNotFound", "Entry not found")
            refusal.headers |= headers
            raise refusal
        if _is_large(name):
            digest = _sha256(content)
            self.hub.store[digest] = content
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            address = {"Location": f"{self.hub.store_address}/store/{digest}"}
            return self._send(302, b"", {**headers, **linked, **address})
        return self._send_file(content, {**headers, "ETag": f'"{_git_id(content)}"'})

    def stored(self, digest: str) -> None:
        self._send_file(self.hub.store[digest], {"ETag": f'"{digest}"'})

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "", "Invalid username or password.")
        organisations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organisations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        self._send_json({"type": "user", "name": user.name, "orgs": organisations, "auth": token})

    # --- writing ---

    def create(self) -> None:
        wanted = json.loads(self.body)
        user = self._user()
        namespace = wanted["organization"] or (user.name if user else "")
        self._may_write(namespace)
        identifier = f"{namespace}/{wanted['name']}"
        address = {"url": f"{self.hub.endpoint}/{identifier}"}
        if ("model", identifier) in self.hub.repositories:
            return self._send_json({**address, "error": "You already created this model repo"}, 409)
        files = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.hub.add(identifier, files, private=wanted.get("visibility") == "private")
        return self._send_json(address)

    def validate(self) -> None:
        assert json.loads(self.body)["repoType"] == "model"
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, kind: str, id: str, revision: str) -> None:
        repository = self._repository(kind, id)
        self._may_write(id.split("/")[0])
        files = repository.commits[self._commit(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            large = _is_large(file["path"]) and not self.hub.all_regular
            there = files.get(file["path"])
            identity = None if there is None else _sha256(there) if large else _git_id(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": identity})
        self._send_json({"files": answers})

    def batch(self, id: str) -> None:
        self._may_write(id.split("/")[0])
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            address = {"upload": {"href": f"{self.hub.store_address}/store/{wanted['oid']}"}}
            new = wanted["oid"] not in self.hub.store
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({"actions": address} if new else {})})
        self._send_json({"transfer": "basic", "objects": objects})

    def put(self, digest: str) -> None:
        assert _sha256(self.body) == digest
        self.hub.store[digest] = self.body
        self._send_json({})

    def commit(self, kind: str, id: str, revision: str) -> None:
        repository = self._repository(kind, id)
        self._may_write(id.split("/")[0])
        files = dict(repository.commits[self._commit(repository, revision)])
        message = ""
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                message = value["summary"]
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(501, "", f"this hub does not know {row['key']}")
        commit = repository.commit(files, revision, message)
        address = f"{self.hub.endpoint}/{id}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": address})

    # --- answers ---

    def _send_json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, content, {**headers, "Accept-Ranges": "bytes"})
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._send(206, content[first : last + 1], {**headers, **span})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        answer = Answer(status, content, {**headers, "Content-Length": str(len(content))})
        if self.fault and self.fault.lie:
            answer = self.fault.lie(answer.but(Connection="close"))
            self.close_connection = True
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = self.fault and not (self.fault.status or self.fault.lie)
        body = content[: len(content) // 2] if broken else answer.content
        path = urlsplit(self.path).path
        with self.hub.counting:
            self.hub.sent[path] += len(body)
        self.wfile.write(body)
        if not broken:
            return
        self.wfile.flush()
        if self.fault.stall:
            self.fault.stall.wait(60)
        self.close_connection = True


ID = r"(?P<id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (rf"GET /api/(?P<kind>model|dataset)s/{ID}(?:/revision/{REVISION})?", _Handler.info),
    (rf"GET /api/(?P<kind>model|dataset)s/{ID}/tree/{REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"POST /api/(?P<kind>model|dataset)s/{ID}/paths-info/{REVISION}", _Handler.paths_info),
    (rf"(?:GET|HEAD) /{ID}/resolve/{REVISION}/(?P<name>.+)", lambda self, **at: self.resolve("model", **at)),
    (rf"(?:GET|HEAD) /datasets/{ID}/resolve/{REVISION}/(?P<name>.+)", lambda self, **at: self.resolve("dataset", **at)),
    (rf"(?:GET|HEAD) /spaces/{ID}/resolve/{REVISION}/(?P<name>.+)", lambda self, **at: self.resolve("space", **at)),
    (r"(?:GET|HEAD) /store/(?P<digest>\w+)", _Handler.stored),
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/(?P<kind>model)s/{ID}/preupload/{REVISION}", _Handler.preupload),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /store/(?P<digest>\w+)", _Handler.put),
    (rf"POST /api/(?P<kind>model)s/{ID}/commit/{REVISION}", _Handler.commit),
]
"""Request line → handler, which gets the pattern's groups."""

"""A Hub on the loopback: what huggingface_hub asks for when it makes, fills and reads a model repository.

    with HubServer() as hub:
        hub.fail(at=4, how="drop")        the fifth request from now on is not answered, and none after it
        HfApi(endpoint=hub.url, token=TOKEN).create_commit(...)
        hub.repos["me/translate"].commits[-1].files     {"config.json": b"...", ...}

It is strict where a publisher could go wrong: without its token everything private is 401, a commit on top of another
one than its `parentCommit` is 412, one that names an upload that is not there is 400, and a bad metadata block too.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_ThisIsTheTokenOfTheTestsOnly"
FAILURES = ("500", "503", "drop", "lost", "hang")
"""What a request can meet: an error; no answer; no answer though the work was done; silence."""
LFS = ".safetensors"


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def add(self, files: dict[str, bytes]) -> Commit:
        hashes = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())
        self.commits.append(Commit(hashlib.sha1(f"{len(self.commits)} {hashes}".encode()).hexdigest(), files))
        return self.commits[-1]


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class HubServer:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        """Large files by their SHA-256."""
        self.requests: list[Request] = []
        self.corrupts = False
        """Whether a commit keeps another README.md than it was sent."""
        self.lock = threading.Lock()
        self.heal()

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.heal()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, at: int, how: str, times: int = 10**9) -> None:
        """From the request number `at` on, counted from now, `times` requests fail."""
        assert how in FAILURES
        with self.lock:
            self.failing = (len(self.requests) + at, how, times)
            self.has_failed.clear()

    def heal(self) -> None:
        self.failing = (0, "", 0)
        self.has_failed = threading.Event()
        released, self.released = getattr(self, "released", None), threading.Event()
        if released:
            released.set()

    def failure_of(self, number: int) -> str:
        first, how, times = self.failing
        return how if first <= number < first + times else ""

    def name_of(self, repo: Repo) -> str:
        return next(name for name, it in self.repos.items() if it is repo)

    def received(self) -> bytes:
        """Every byte that came in, and once more what was encoded in it."""
        parts = []
        for request in self.requests:
            parts += [request.path.encode(), json.dumps(request.headers).encode(), request.body]
            for encoded in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', request.body):
                parts.append(base64.b64decode(encoded))
        return b"\n".join(parts)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer as one packet: TCP would hold back a second one for 40 ms

    def log_message(self, *arguments) -> None:
        pass

    def handle_any(self) -> None:
        hub = self.hub
        body = self.read_body()
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
            failure, released = hub.failure_of(number), hub.released
            if not failure or failure == "lost":
                status, headers, answer = self.answer(body)
        if failure:
            hub.has_failed.set()
        if failure in ("drop", "lost"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif failure == "hang":
            self.close_connection = True
            released.wait(60)
        elif failure:
            self.send(int(failure), {}, b'{"error": "not now"}')
        else:
            self.send(status, headers, answer)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # The answers: (status, headers, body)

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(self.path).path)
        for method, pattern, needs_token, answer in ROUTES:
            if self.command not in method or not (found := re.fullmatch(pattern, path)):
                continue
            names = found.groupdict()
            if "repo" in names:
                names["repo"] = self.hub.repos.get(names["repo"])
            is_hidden = "repo" in names and names["repo"] and names["repo"].private
            if (needs_token or is_hidden) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return error(401, "Invalid username or password.", "RepoNotFound")
            if "repo" in names and names["repo"] is None:
                return error(404, "Repository not found", "RepoNotFound")
            return answer(self, body, **names)
        return error(404, f"no such page: {self.command} {path}", "EntryNotFound")

    def create(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return as_json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repo(private=asked["visibility"] == "private")
        self.hub.repos[name].add({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return as_json({"url": f"{self.hub.url}/{name}"})

    def validate(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        block = json.loads(body)["content"].split("---\n")[1]
        if not isinstance(yaml.safe_load(block), dict):
            return as_json({"errors": [{"message": "metadata is no mapping"}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def info(self, body: bytes, repo: Repo, revision: str | None = None) -> tuple[int, dict[str, str], bytes]:
        if (commit := at(repo, revision)) is None:
            return error(404, "no such revision", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in commit.files]
        return as_json(
            {
                "id": self.hub.name_of(repo),
                "sha": commit.oid,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def tree(self, body: bytes, repo: Repo, revision: str, folder: str | None = None) -> tuple[int, dict, bytes]:
        commit = at(repo, revision)
        if commit is None or folder:
            return error(404, "no such folder", "EntryNotFound")
        return as_json([entry(path, content) for path, content in commit.files.items()])

    def preupload(self, body: bytes, repo: Repo, revision: str) -> tuple[int, dict[str, str], bytes]:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": oid(file["path"], repo.files[file["path"]]) if file["path"] in repo.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        return as_json({"files": files})

    def batch(self, body: bytes, repo: Repo) -> tuple[int, dict[str, str], bytes]:
        objects = json.loads(body)["objects"]
        for it in objects:
            if it["oid"] not in self.hub.uploads:
                upload = f"{self.hub.url}/upload/{it['oid']}?X-Amz-Signature=do-not-show"
                it["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{self.hub.url}/uploaded"}}
        return as_json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> tuple[int, dict[str, str], bytes]:
        if hashlib.sha256(body).hexdigest() != oid:
            return error(400, "the upload is not what was announced", "BadUpload")
        self.hub.uploads[oid] = body
        return 200, {}, b""

    def uploaded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return as_json({}) if json.loads(body)["oid"] in self.hub.uploads else error(404, "no such upload", "None")

    def commit(self, body: bytes, repo: Repo, revision: str) -> tuple[int, dict[str, str], bytes]:
        lines = [json.loads(line) for line in body.splitlines()]
        header, operations = lines[0]["value"], lines[1:]
        if header.get("parentCommit") not in (None, repo.commits[-1].oid):
            return error(412, "A commit has happened since. Please refresh and try again.", "Precondition")
        files = dict(repo.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.uploads:
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif operation["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return error(400, f"cannot do {operation['key']} {value['path']}", "BadCommit")
        if self.hub.corrupts:
            files["README.md"] = b"something else\n"
        commit = repo.add(files)
        page = f"{self.hub.url}/{self.hub.name_of(repo)}/commit/{commit.oid}"
        return as_json({"success": True, "commitOid": commit.oid, "commitUrl": page})

    def resolve(self, body: bytes, repo: Repo, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        commit = at(repo, revision)
        if commit is None or path not in commit.files:
            return error(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        return 200, {"ETag": f'"{oid(path, content)}"', "X-Repo-Commit": commit.oid}, content


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[\w.-]+)"
ROUTES = [
    (["POST"], r"/api/repos/create", True, _Handler.create),
    (["POST"], r"/api/validate-yaml", False, _Handler.validate),
    (["GET"], rf"/api/models/{REPO}", False, _Handler.info),
    (["GET"], rf"/api/models/{REPO}/revision/{REVISION}", False, _Handler.info),
    (["GET"], rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?", False, _Handler.tree),
    (["POST"], rf"/api/models/{REPO}/preupload/{REVISION}", True, _Handler.preupload),
    (["POST"], rf"/{REPO}\.git/info/lfs/objects/batch", True, _Handler.batch),
    (["PUT"], r"/upload/(?P<oid>\w+)", False, _Handler.upload),  # the address itself is the permission
    (["POST"], r"/uploaded", True, _Handler.uploaded),
    (["POST"], rf"/api/models/{REPO}/commit/{REVISION}", True, _Handler.commit),
    (["GET", "HEAD"], rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", False, _Handler.resolve),
]


def at(repo: Repo, revision: str | None) -> Commit | None:
    if revision in (None, "main"):
        return repo.commits[-1]
    return next((commit for commit in repo.commits if commit.oid == revision), None)


def oid(path: str, content: bytes) -> str:
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    listed = {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
    if path.endswith(LFS):
        pointer = hashlib.sha1(
            content
        ).hexdigest()  # git's own id is that of a small file that points to the large one
        listed |= {"oid": pointer, "lfs": {"oid": oid(path, content), "size": len(content), "pointerSize": 134}}
    return listed


def as_json(value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, message: str, code: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": message}
    return status, headers, json.dumps({"error": message}).encode()

"""A Hub on this machine: what `huggingface_hub` needs of it to create, upload, list and download, and to fail.

The client reads its settings when it is imported, so it runs in a child process with `HubStandIn.environment`.

    python tests/hub_stand_in.py hub    # keeps its state in the folder; prints what to type in another terminal

    objects/HASH   contents of files, by SHA-256
    repos.json     for each name: owner, visibility, branches, tags and commits; written whole after each change

The name of a dataset has "datasets/" before it; it can be read, not written.
"""

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


LARGE = 10 * 2**20  # bytes from which a file is stored beside git, as binary ones are
_MODEL = "(?P<repo>[^/]+/[^/]+)"
_DATASET = "(?P<repo>datasets/[^/]+/[^/]+)"
_REVISION = "(?P<revision>[^/]+)"


@dataclasses.dataclass
class Cut:
    """Break the connection of requests that match.

    Args:
        request: regular expression over "METHOD /path".
        after_bytes: of the body that are read first.
        times: number of requests; those after them are answered.
    """

    request: str
    after_bytes: int = 0
    times: int = 10**6


class Refusal(Exception):
    """An answer other than success: status, words, and the code that the client looks for."""

    def __init__(self, status: int, words: str, code: str | None = None, commit: str | None = None):
        super().__init__(words)
        self.status, self.code, self.commit = status, code, commit


class HubStandIn:
    """The server; a context manager.

    Args:
        folder: of the state, kept between servers.
        tokens: what each token's user is called.

    Attributes:
        requests: "METHOD /path" of each, in order.
        num_bytes: received in bodies of uploads so far.
        refuses_tokens: answer as to a token that was withdrawn.
        card_errors: words with which cards are refused.
        cut: see `Cut`.
        delay: seconds to wait for after each 64 KiB of an upload.
    """

    def __init__(self, folder: pathlib.Path, *, tokens: dict[str, str] | None = None):
        self.folder, self.tokens = pathlib.Path(folder), tokens or {"hf_of_user": "user"}
        self.requests: list[str] = []
        self.num_bytes, self.refuses_tokens, self.cut, self.delay = 0, False, None, 0.0
        self.card_errors: list[str] = []
        self.lock = threading.RLock()
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        state = self.folder / "repos.json"
        self.repos: dict[str, dict] = json.loads(state.read_text()) if state.exists() else {}

    def __enter__(self) -> "HubStandIn":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: pathlib.Path, *, token: str | None = "hf_of_user") -> dict[str, str]:
        """Of a child process that talks to this server, with a cache and a token of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        return kept | settings | ({"HF_TOKEN": token} if token else {})

    def files(self, repo: str, revision: str = "main") -> dict[str, dict]:
        """Files of a revision by path: `sha256`, `oid`, `size`, `is_large`."""
        return self.commit_of(repo, revision)["files"]

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """Content of a file."""
        return self.object_path(self.files(repo, revision)[path]["sha256"]).read_bytes()

    def add(self, repo: str, files: dict[str, bytes], *, is_private: bool = True) -> str:
        """Make a repository of these files, or a commit of them, as if somebody had uploaded them; returns the commit.

        Args:
            repo: OWNER/NAME of a model, or datasets/OWNER/NAME.
            files: content by path.
            is_private: a new repository is.
        """
        self.repos.setdefault(repo, _new_repo(repo.split("/")[-2], is_private))
        entries = {path: self.store(data, is_large=False) for path, data in files.items()}
        return self.write_commit(repo, "main", "files of somebody", entries)

    # What the handler stands on ------------------------------------------------------------------------------------

    def object_path(self, sha256: str) -> pathlib.Path:
        return self.folder / "objects" / sha256

    def store(self, data: bytes, *, is_large: bool) -> dict:
        sha256 = hashlib.sha256(data).hexdigest()
        self.object_path(sha256).write_bytes(data)
        oid = sha256 if is_large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"sha256": sha256, "oid": oid, "size": len(data), "is_large": is_large}

    def sha_of(self, repo: str, revision: str) -> str:
        held = self.repos[repo]
        sha = held["branches"].get(revision) or held["tags"].get(revision) or revision
        if sha not in held["commits"]:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit_of(self, repo: str, revision: str) -> dict:
        return self.repos[repo]["commits"][self.sha_of(repo, revision)]

    def write_commit(self, repo: str, branch: str, title: str, changes: dict[str, dict | None]) -> str:
        """All changes or, on an error before this, none; None deletes a file."""
        held = self.repos[repo]
        parent = held["branches"].get(branch)
        files = {**(held["commits"][parent]["files"] if parent else {}), **changes}
        commit = {"parent": parent, "title": title, "files": {path: file for path, file in files.items() if file}}
        sha = hashlib.sha1(json.dumps([commit, len(held["commits"])]).encode()).hexdigest()
        held["commits"][sha], held["branches"][branch] = commit, sha
        self.save()
        return sha

    def save(self) -> None:
        path = self.folder / "repos.json"
        path.with_suffix(".part").write_text(json.dumps(self.repos))
        os.replace(path.with_suffix(".part"), path)


def _new_repo(owner: str, is_private: bool) -> dict:
    return {"owner": owner, "private": is_private, "gated": False, "branches": {}, "tags": {}, "commits": {}}


class _Handler(BaseHTTPRequestHandler):
    """One request: find its route, read its body, answer."""

    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *args) -> None:
        pass

    def _serve(self) -> None:
        self.path, self.query = urllib.parse.urlsplit(self.path)[2:4]
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        if self._is_cut(request):
            return
        try:
            body = self._receive()
            for method, pattern, answer, writes in _ROUTES:
                match = re.fullmatch(pattern, self.path)
                if match and self.command in method.split():
                    found = {name: urllib.parse.unquote(text) for name, text in match.groupdict().items() if text}
                    with self.hub.lock:
                        self._check_access(found.get("repo"), writes)
                        return answer(self, body, **found)
            raise Refusal(404, f"no such route: {request}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code, "X-Repo-Commit": refusal.commit}
            self._answer({"error": str(refusal)}, status=refusal.status, headers=headers)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _is_cut(self, request: str) -> bool:
        cut = self.hub.cut
        if cut is None or cut.times <= 0 or not re.search(cut.request, request):
            return False
        cut.times -= 1
        self.rfile.read(min(cut.after_bytes, int(self.headers.get("Content-Length", 0))))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def _receive(self) -> bytes:
        parts = []
        for part in self._parts():
            parts.append(part)
            if self.command == "PUT":
                self.hub.num_bytes += len(part)
                time.sleep(self.hub.delay)
        return b"".join(parts)

    def _parts(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left > 0:
            part = self.rfile.read(min(left, 2**16))
            if not part:
                raise ConnectionError("the client went away")
            left -= len(part)
            yield part

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None or self.hub.refuses_tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _check_access(self, repo: str | None, writes: bool) -> None:
        user = self._user()
        if repo is None:
            return
        held = self.hub.repos.get(repo)
        if held is None or (held["private"] and held["owner"] != user):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if writes and held["owner"] != user:
            raise Refusal(403, f"You don't have the rights to write to {repo}")

    def _answer(self, content, *, status: int = 200, headers: dict | None = None) -> None:
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        self._send(status, headers)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    # Routes --------------------------------------------------------------------------------------------------------

    def whoami(self, body) -> None:
        if self._user() is None:
            raise Refusal(401, "Invalid username or password.")
        self._answer({"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body) -> None:
        settings, user = json.loads(body), self._user()
        owner = settings.get("organization") or user
        repo = f"{owner}/{settings['name']}"
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            return self._answer({"error": "You already created this model repo", "url": url}, status=409)
        is_private = settings.get("visibility") == "private" or bool(settings.get("private"))
        self.hub.repos[repo] = _new_repo(owner, is_private)
        attributes = self.hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", is_large=False)
        self.hub.write_commit(repo, "main", "initial commit", {".gitattributes": attributes})
        self._answer({"url": url, "name": repo, "id": repo})

    def validate(self, body) -> None:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return self._answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        errors = [{"message": words} for words in self.hub.card_errors]
        self._answer({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def settings(self, body, repo) -> None:
        wanted, held = json.loads(body), self.hub.repos[repo]
        held["gated"] = wanted.get("gated", held["gated"])
        if "visibility" in wanted or "private" in wanted:
            held["private"] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.save()
        self._answer(held["gated"])

    def preupload(self, body, repo, revision) -> None:
        existing = self.hub.files(repo, revision)
        files = []
        for file in json.loads(body)["files"]:
            is_large = file["size"] >= LARGE or b"\0" in base64.b64decode(file["sample"])
            mode = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            files.append(mode | {"oid": existing.get(file["path"], {}).get("oid")})
        self._answer({"files": files})

    def batch(self, body, repo) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.object_path(wanted["oid"]).exists():
                upload, verify = f"{self.hub.url}/lfs/{wanted['oid']}", f"{self.hub.url}/lfs-verify"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def upload(self, body, oid) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its hash says")
        self.hub.store(body, is_large=True)
        self._answer({})

    def verify(self, body) -> None:
        wanted = json.loads(body)
        path = self.hub.object_path(wanted["oid"])
        if not path.exists() or path.stat().st_size != wanted["size"]:
            raise Refusal(404, "no such object")
        self._answer({})

    def commit(self, body, repo, revision) -> None:
        changes, title = {}, ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                changes[value["path"]] = self.hub.store(base64.b64decode(value["content"]), is_large=False)
            elif key == "lfsFile":
                if not self.hub.object_path(value["oid"]).exists():
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                names = {"sha256": value["oid"], "oid": value["oid"], "size": value["size"], "is_large": True}
                changes[value["path"]] = names
            elif key == "deletedFile":
                changes[value["path"]] = None
            else:
                raise Refusal(400, f"unknown operation {key}")
        self.hub.sha_of(repo, revision)
        sha = self.hub.write_commit(repo, revision, title, changes)
        self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def branch(self, body, repo, revision) -> None:
        self._make_reference("branches", repo, revision, json.loads(body or b"{}").get("startingPoint", "main"))

    def tag(self, body, repo, revision) -> None:
        self._make_reference("tags", repo, json.loads(body)["tag"], revision)

    def _make_reference(self, kind: str, repo: str, name: str, at: str) -> None:
        references = self.hub.repos[repo][kind]
        if name in references:
            raise Refusal(409, f"Reference already exists: {name}")
        references[name] = self.hub.sha_of(repo, at)
        self.hub.save()
        self._answer({})

    def refs(self, body, repo) -> None:
        held = self.hub.repos[repo]
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/"}
        listed = {
            kind: [{"name": name, "ref": start + name, "targetCommit": sha} for name, sha in held[kind].items()]
            for kind, start in kinds.items()
        }
        self._answer(listed | {"converts": []})

    def info(self, body, repo, revision="main") -> None:
        sha, held = self.hub.sha_of(repo, revision), self.hub.repos[repo]
        siblings = [{"rfilename": path} for path in self.hub.files(repo, sha)]
        name = repo.removeprefix("datasets/")
        facts = {"_id": name, "id": name, "modelId": name, "private": held["private"], "gated": held["gated"]}
        self._answer(facts | {"sha": sha, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body, repo, revision, folder="") -> None:
        start = f"{folder}/" if folder else ""
        entries = [entry for entry in self._entries(repo, revision) if entry["path"].startswith(start)]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        is_deep = "true" in urllib.parse.parse_qs(self.query.lower()).get("recursive", [])
        self._answer([entry for entry in entries if is_deep or "/" not in entry["path"][len(start) :]])

    def paths(self, body, repo, revision) -> None:
        wanted = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
        self._answer([entry for entry in self._entries(repo, revision) if entry["path"] in wanted])

    def _entries(self, repo: str, revision: str) -> list[dict]:
        files = self.hub.files(repo, revision)
        folders = {str(parent) for path in files for parent in pathlib.PurePosixPath(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        for path, file in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
            large = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
            entries.append(entry | ({"lfs": large} if file["is_large"] else {}))
        return entries

    def resolve(self, body, repo, revision, path) -> None:
        sha = self.hub.sha_of(repo, revision)
        file = self.hub.files(repo, sha).get(path)
        if file is None:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", commit=sha)
        first, last = self._range(file["size"])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file["oid"]}"', "Content-Length": str(last - first + 1)}
        is_part = "Range" in self.headers
        headers |= {"Content-Range": f"bytes {first}-{last}/{file['size']}"} if is_part else {}
        self._send(206 if is_part else 200, headers | {"Content-Type": "application/octet-stream"})
        if self.command == "GET":
            self.wfile.write(self.hub.object_path(file["sha256"]).read_bytes()[first : last + 1])

    def _range(self, size: int) -> tuple[int, int]:
        """First and last byte that are asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        return int(wanted[1]), min(int(wanted[2] or size), size - 1)


# Methods, path, answer, and whether it changes the repository.
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami, False),
    ("POST", "/api/repos/create", _Handler.create, False),
    ("POST", "/api/validate-yaml", _Handler.validate, False),
    ("PUT", f"/api/models/{_MODEL}/settings", _Handler.settings, True),
    ("POST", f"/api/models/{_MODEL}/preupload/{_REVISION}", _Handler.preupload, True),
    ("POST", f"/{_MODEL}.git/info/lfs/objects/batch", _Handler.batch, True),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload, False),
    ("POST", "/lfs-verify", _Handler.verify, False),
    ("POST", f"/api/models/{_MODEL}/commit/{_REVISION}", _Handler.commit, True),
    ("POST", f"/api/models/{_MODEL}/branch/{_REVISION}", _Handler.branch, True),
    ("POST", f"/api/models/{_MODEL}/tag/{_REVISION}", _Handler.tag, True),
    ("GET", f"/api/models/{_MODEL}/refs", _Handler.refs, False),
    ("GET", f"/api/models/{_MODEL}", _Handler.info, False),
    ("GET", f"/api/models/{_MODEL}/revision/{_REVISION}", _Handler.info, False),
    ("GET", f"/api/models/{_MODEL}/tree/{_REVISION}", _Handler.tree, False),
    ("GET HEAD", f"/{_MODEL}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve, False),
    ("GET", f"/api/{_DATASET}", _Handler.info, False),
    ("GET", f"/api/{_DATASET}/refs", _Handler.refs, False),
    ("GET", f"/api/{_DATASET}/revision/{_REVISION}", _Handler.info, False),
    ("GET", f"/api/{_DATASET}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree, False),
    ("POST", f"/api/{_DATASET}/paths-info/{_REVISION}", _Handler.paths, False),
    ("GET HEAD", f"/{_DATASET}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve, False),
]


def main() -> None:
    """Serve until Ctrl-C."""
    with HubStandIn(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "hub")) as hub:
        settings = hub.environment(hub.folder.resolve() / "home")
        settings = {name: value for name, value in settings.items() if name.startswith("HF_")}
        print("in another terminal:\n  export " + " ".join(f"{name}={value}" for name, value in settings.items()))
        print("then publish as user/NAME; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()

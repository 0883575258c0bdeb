"""A local stand-in for the Hugging Face hub, for tests with the real libraries.

    with Hub({"models/someone/lm": {"main": folder}, "datasets/someone/text": {"main": folder}}) as hub:
        subprocess.run(..., env=os.environ | {"HF_ENDPOINT": hub.url})

It implements the part of the hub's protocol that loading a model and streaming a dataset need: a repository's metadata,
folders and files, by branch or commit. UploadHub also accepts uploads. All responses go through `Hub.send`, which tests
override for a hub that fails, stalls or closes the connection.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FILE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<repo>(?:models|datasets)/.+?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
Answer = tuple[int, dict, bytes]  # status, headers, body


class Hub(ThreadingHTTPServer):
    """Serves `repos` at `url` until its `with` block ends. `requests` lists the requests: "GET /path?query".

    repos: {"models/NAME" or "datasets/NAME": {revision: folder}, or the new name of a moved repository}.
    """

    def __init__(self, repos: dict[str, dict[str, Path] | str], port: int = 0):
        super().__init__(("127.0.0.1", port), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.requests = repos, []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()  # asks so often whether to end
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def answer(self, url: str, byte_range: str | None) -> Answer:
        path, query = urlsplit(url).path, urlsplit(url).query
        if match := API.fullmatch(path):
            parts = match.groupdict()
            repo = parts["repo"]
        elif match := FILE.fullmatch(path):
            parts = match.groupdict() | {"what": "file"}
            repo = parts["repo"] if parts["repo"].startswith("datasets/") else f"models/{parts['repo']}"
        else:
            return error(404, "EntryNotFound")
        revisions = self.repos.get(repo)
        if revisions is None:
            return error(401, "RepoNotFound")  # the hub's response without a login
        if isinstance(revisions, str):
            old, new = (name.partition("/")[2] for name in (repo, revisions))
            return 307, {"Location": url.replace(old, new, 1), "Content-Length": "0"}, b""

        revision = unquote(parts["revision"] or "main")
        revision = {commit_of(repo, name): name for name in revisions}.get(revision, revision)
        if revision not in revisions:
            return error(404, "RevisionNotFound")
        folder, commit = revisions[revision], commit_of(repo, revision)
        file = folder / unquote(parts["path"] or "")
        if not file.exists():
            return error(404, "EntryNotFound")
        if parts["what"] == "file":
            return file_answer(file, commit, byte_range)
        if parts["what"] == "tree":
            files = file.rglob("*") if "recursive=true" in query else file.iterdir()
            return json_answer([tree_entry(file, folder) for file in sorted(files)])
        return json_answer({"id": repo.partition("/")[2], "sha": commit})

    def send(self, request: BaseHTTPRequestHandler, answer: Answer) -> None:
        """Write the answer to `request`."""
        status, headers, body = answer
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


class UploadHub(Hub):
    """Also accepts uploads into `folder`/OWNER/NAME, with `token`, which may write as `owner` only.

    It implements creating a repository, asking for the upload mode of each file (LFS for weights), LFS uploads and the
    commit. `commits` lists the files of each commit, {path: "regular" or "lfs"}; `visibility` is by repository.
    """

    def __init__(self, folder: Path, token: str, owner: str, port: int = 0):
        super().__init__({}, port)
        self.folder, self.token, self.owner, self.visibility = folder, token, owner, {}
        self.large_files, self.commits = {}, []

    def answer(self, url: str, byte_range: str | None) -> Answer:
        answer = super().answer(url, byte_range)
        if answer[0] == 200 and (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", url)):
            return json_answer(json.loads(answer[2]) | {"private": self.visibility[match[1]] == "private"})
        return answer

    def receive(self, path: str, headers, body: bytes) -> Answer:
        if match := re.fullmatch(r"/large/(\w+)", path):  # needs no token
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.large_files[match[1]] = body
            return json_answer({})
        if headers["Authorization"] != f"Bearer {self.token}":
            return error(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            if request["organization"] != self.owner:
                return error(403, "", "You don't have the rights to create a model under this namespace")
            found = repo in self.visibility
            self.visibility.setdefault(repo, request.get("visibility", "public"))
            (self.folder / repo).mkdir(parents=True, exist_ok=True)
            self.repos[f"models/{repo}"] = {"main": self.folder / repo}
            return json_answer({"url": f"{self.url}/{repo}"}, 409 if found else 200)
        if path == "/api/validate-yaml":
            bad = "license: nonsense" in json.loads(body)["content"]
            return json_answer({"errors": [{"message": '"license" must be one of'}] * bad}, 400 if bad else 200)
        if match := re.fullmatch(r"/api/models/.+/preupload/main", path):
            return json_answer({"files": [
                {"path": file["path"], "uploadMode": upload_mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        if path.endswith(".git/info/lfs/objects/batch"):
            return json_answer({"objects": [
                file | {"actions": {"upload": {"href": f"{self.url}/large/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]})  # fmt: skip
        match = re.fullmatch(r"/api/models/(.+)/commit/main", path)
        _, *files = map(json.loads, body.splitlines())
        for file in (file["value"] for file in files):
            content = self.large_files[file["oid"]] if "oid" in file else base64.b64decode(file["content"])
            (self.folder / match[1] / file["path"]).write_bytes(content)
        self.commits.append({f["value"]["path"]: "lfs" if f["key"] == "lfsFile" else "regular" for f in files})
        return json_answer({"commitUrl": f"{self.url}/{match[1]}/commit/{'0' * 40}", "commitOid": "0" * 40})


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as on the real hub

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.send(self, self.server.receive(self.path, self.headers, body))

    do_PUT = do_POST

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.send(self, self.server.answer(self.path, self.headers["Range"]))

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def file_answer(file: Path, commit: str, byte_range: str | None) -> Answer:
    body, status = file.read_bytes(), 200
    headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
    if byte_range:
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", byte_range).groups()
        first, last, size = int(first), min(int(last or len(body)), len(body) - 1), len(body)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        body, status = body[first : last + 1], 206
    return status, headers | {"Content-Length": str(len(body))}, body


def upload_mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".pt")) else "regular"


def json_answer(value, status: int = 200) -> Answer:
    body = json.dumps(value).encode()
    return status, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body


def tree_entry(file: Path, folder: Path) -> dict:
    name = file.relative_to(folder).as_posix()
    kind = "directory" if file.is_dir() else "file"
    return {"type": kind, "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": file.stat().st_size}


def error(status: int, code: str, message: str = "") -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}, b""

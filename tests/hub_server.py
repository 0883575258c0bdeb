"""A stand-in for the Hugging Face hub on this machine, for tests that go through the real libraries.

    with Hub({"models/someone/lm": {"main": folder}, "datasets/someone/text": {"main": folder}}) as hub:
        subprocess.run(..., env=os.environ | {"HF_ENDPOINT": hub.url})

It speaks as much of the hub's protocol as reading a model and streaming a dataset take: what is known of a
repository, its folders, and its files, by branch or by commit. Whatever it sends goes through `Hub.send`: a test
that needs a hub which errs, stalls or cuts the connection overrides that.
"""

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
    """Serves `repos` at `url` until its `with` block ends. `requests` lists what was asked: "GET /path?query".

    repos: {"models/NAME" or "datasets/NAME": {revision: folder}}, or the new name of a repository that has moved.
    """

    def __init__(self, repos: dict[str, dict[str, Path] | str]):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.requests = repos, []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def answer(self, url: str, byte_range: str | None) -> Answer:
        path, query = urlsplit(url).path, urlsplit(url).query
        if match := API.fullmatch(path):
            asked = match.groupdict()
            repo = asked["repo"]
        elif match := FILE.fullmatch(path):
            asked = match.groupdict() | {"what": "file"}
            repo = asked["repo"] if asked["repo"].startswith("datasets/") else f"models/{asked['repo']}"
        else:
            return error(404, "EntryNotFound")
        revisions = self.repos.get(repo)
        if revisions is None:
            return error(401, "RepoNotFound")  # what the hub says to somebody who is not logged in
        if isinstance(revisions, str):
            old, new = (name.partition("/")[2] for name in (repo, revisions))
            return 307, {"Location": url.replace(old, new, 1), "Content-Length": "0"}, b""

        revision = unquote(asked["revision"] or "main")
        revision = {commit_of(repo, name): name for name in revisions}.get(revision, revision)
        if revision not in revisions:
            return error(404, "RevisionNotFound")
        folder, commit = revisions[revision], commit_of(repo, revision)
        file = folder / unquote(asked["path"] or "")
        if not file.exists():
            return error(404, "EntryNotFound")
        if asked["what"] == "file":
            return file_answer(file, commit, byte_range)
        if asked["what"] == "tree":
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


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as the hub's do

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


def json_answer(value) -> Answer:
    body = json.dumps(value).encode()
    return 200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body


def tree_entry(file: Path, folder: Path) -> dict:
    name = file.relative_to(folder).as_posix()
    kind = "directory" if file.is_dir() else "file"
    return {"type": kind, "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": file.stat().st_size}


def error(status: int, code: str) -> Answer:
    return status, {"X-Error-Code": code, "Content-Length": "0"}, b""

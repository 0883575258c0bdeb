"""A local Weights & Biases server: the parts that wandb.Api needs to read runs, and wandb.init to create them.

Its runs are those that offline runs recorded (`wandb sync` would send these files' records to the real server; here
they are put together as it does: summary and config by key, history rows as logged) and those that online runs sent.
"""

import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB) after a header of 7 bytes."""
    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # no room for another header in this block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def offline_run(path: Path) -> dict:
    """An offline run as on the server after `wandb sync`."""
    run = {"config": {}, "summary": {}, "history": [], "state": "crashed"}

    def put(all_keys: dict, items) -> None:
        for item in items:
            into, (*parents, key) = all_keys, item.nested_key or [item.key]
            for parent in parents:
                into = into.setdefault(parent, {})
            into[key] = json.loads(item.value_json)

    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
            run |= {"project": record.run.project, "created": record.run.start_time.ToJsonString()}
            put(run["config"], record.run.config.update)
        elif kind == "config":
            put(run["config"], record.config.update)
        elif kind == "summary":
            put(run["summary"], record.summary.update)
        elif kind == "history":
            run["history"].append({})
            put(run["history"][-1], record.history.item)
        elif kind == "exit":
            run["state"] = "failed" if record.exit.exit_code else "finished"
    return run


class WandbServer:
    """Serves the queries of wandb.Api and wandb.init at `url`. `queries` records them."""

    def __init__(self, runs: list[dict], entity: str, project: str):
        self.runs, self.path, self.queries = {run["id"]: run for run in runs}, (entity, project), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = b"{}"  # to telemetry and files
                if self.path == "/graphql":
                    answer = json.dumps({"data": outer.answer(**json.loads(body))}).encode()
                elif self.path.endswith("/file_stream"):
                    outer.receive(self.path.split("/")[-2], json.loads(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query: str, variables: dict | None = None, operationName: str = "") -> dict:
        variables = variables or {}
        self.queries.append((query, variables))
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "mutation UpsertBucket" in query:
            return {"upsertBucket": self.upsert(**variables)}
        if "query RunResumeStatus" in query:
            return {"model": self.names() | {"bucket": self.resume_status(variables["name"])}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if (variables.get("entity"), variables.get("project")) != self.path:
            return {"project": None}
        if "query Runs(" in query:
            return {"project": {"internalId": "1", "readOnly": False} | self.page(**variables)}
        run = self.runs[variables.get("name") or variables.get("runName") or variables["run"]]
        if "parquetHistory" in query:  # exports of finished runs; here everything is still in the live data
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}
        if "sampledHistory" in query:
            spec = json.loads(variables["spec"])
            rows = [row for row in run["history"] if spec["minStep"] <= row["_step"] <= spec["maxStep"]]
            rows = [{key: row[key] for key in spec["keys"]} for row in rows if row.keys() >= set(spec["keys"])]
            return {"project": {"run": {"sampledHistory": [rows]}}}
        if "historyKeys }" in query:
            last_step = run["history"][-1]["_step"] if run["history"] else -1
            return {"project": {"run": {"historyKeys": {"lastStep": last_step}}}}
        return {"project": {"run": self.node(run, full=True)}}

    def names(self) -> dict:
        entity, project = self.path
        return {"id": "1", "name": project, "entity": {"id": "1", "name": entity}}

    def upsert(self, name: str, config: str = "{}", groupName: str = "", displayName: str = "", **_) -> dict:
        """Create or resume a run, or update its config."""
        inserted = name not in self.runs
        run = self.runs.setdefault(name, {
            "id": name, "name": displayName, "group": groupName, "created": "2026-01-01T00:00:00Z", "config": {},
            "summary": {}, "history": [],
        })  # fmt: skip
        run["config"] |= {key: entry["value"] for key, entry in json.loads(config).items()}
        run["state"] = "running"
        return {"bucket": self.node(run, full=True) | {"project": self.names()}, "inserted": inserted}

    def resume_status(self, name: str) -> dict | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        last = json.dumps([json.dumps(row) for row in run["history"][-1:]])
        counts = {"historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0}
        return self.node(run, full=True) | counts | {"historyTail": last, "eventsTail": "[]", "tags": []}

    def receive(self, name: str, sent: dict) -> None:
        """Store rows of the history from `offset` on, a summary, or the end of a run."""
        run, files = self.runs[name], sent.get("files") or {}
        if rows := files.get("wandb-history.jsonl"):
            assert rows["offset"] <= len(run["history"]), "rows are missing"
            run["history"][rows["offset"] :] = map(json.loads, rows["content"])
        if summary := files.get("wandb-summary.json"):
            run["summary"] = json.loads(summary["content"][-1])
        if sent.get("complete"):
            run["state"] = "failed" if sent["exitcode"] else "finished"

    def page(self, order: str, perPage: int, filters: str = "{}", cursor: str | None = None, **_) -> dict:
        """A page of the runs of a group, in order of creation."""
        group = json.loads(filters).get("group")
        runs = [run for run in self.runs.values() if group in (None, run["group"])]
        runs.sort(key=lambda run: run["created"], reverse=order == "-created_at")
        start = int(cursor or 0)
        edges = [{"node": self.node(run), "cursor": str(start + i + 1)} for i, run in enumerate(runs[start:][:perPage])]
        more = start + perPage < len(runs)
        return {"runCount": len(runs), "runs": {"edges": edges, "pageInfo": {"hasNextPage": more, "endCursor": None}}}

    def node(self, run: dict, full: bool = False) -> dict:
        """A run as the server sends it: nested JSON, each config value in a dict; lists of runs omit these."""
        node = {
            "id": run["id"], "name": run["id"], "displayName": run["name"], "group": run["group"], "projectId": "1",
            "state": run["state"], "createdAt": run["created"], "user": {"name": "me", "username": "me"},
        }  # fmt: skip
        if full:
            config = {key: {"value": value} for key, value in run["config"].items()}
            node |= {"config": json.dumps(config), "summaryMetrics": json.dumps(run["summary"])}
        return node

"""As much of a W&B server as its client needs to keep a run: GraphQL, the stream of a run's lines, uploads."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, RUN = "someone", "drawn"


class WandbServer(ThreadingHTTPServer):
    """Knows one key. What a run brought stands in `runs`, `lines` by file name, and `files`; `gone` refuses everything."""

    def __init__(self, key: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.authorization = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: list[dict[str, Any]] = []
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.exit_codes: list[int] = []
        self.gone = False

    def data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What GraphQL answers."""
        if "UpsertBucket" in query:
            self.runs.append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": ENTITY}}
            run = {"id": "r", "name": variables["name"], "displayName": RUN, "project": project, "config": "{}"}
            return {"upsertBucket": {"bucket": run | {"sweepName": None, "historyLineCount": 0}, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: WandbServer

    def do_POST(self) -> None:
        """GraphQL, or lines of a run."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.gone:
            self._answer(503, {})
        elif self.headers["Authorization"] != self.server.authorization:
            given = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
            self._answer(401, {"errors": [{"message": f"no such key: {given}"}]})
        elif self.path == "/graphql":
            self._answer(200, {"data": self.server.data(body["query"], body["variables"])})
        else:
            for name, sent in (body.get("files") or {}).items():
                self.server.lines.setdefault(name, []).extend(json.loads(line) for line in sent["content"])
            if body.get("complete"):
                self.server.exit_codes.append(body["exitcode"])
            self._answer(200, {})

    def do_PUT(self) -> None:
        """A file of a run."""
        self.server.files[self.path.removeprefix("/upload/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

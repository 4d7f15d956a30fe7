"""A W&B server for tests, on the loopback: as much of its protocol as the service of wandb 0.31 speaks in a run.

Written from what that service sends: GraphQL operations, the stream of a run's rows, and files by PUT. It can be one
in trouble, too: `how` may change while a run goes on.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

KEY = "0123456789abcdef0123456789abcdef01234567"  # looks like one
HISTORY, SUMMARY, STREAM = "wandb-history.jsonl", "wandb-summary.json", "/file_stream"
ENDING = "evaluation/"
How = Literal["well", "fails", "hangs", "drops"]  # answers; says 500; takes requests and is silent; ends connections
HANG_SECONDS = 600.0  # longer than any test


@dataclass
class Artifact:
    """An artifact: what was said of it, and its files by name."""

    said: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False

    @property
    def aliases(self) -> set[str]:
        return {alias["alias"] for alias in self.said["aliases"]}


@dataclass
class Arrived:
    """What the server was told of a run."""

    asked: list[str] = field(default_factory=list)  # GraphQL operations, and paths of what else was asked for
    run: dict[str, Any] = field(default_factory=dict)  # what the first UpsertBucket said
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the history, by place
    summary: dict[str, Any] = field(default_factory=dict)
    complete: bool = False  # the stream was closed
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)  # artifacts that the run takes as its inputs
    sweep: str = ""  # the file of a sweep whose agents may ask for `trials`
    trials: list[dict[str, Any]] = field(default_factory=list)  # values by parameter, of those not yet given out

    def rows(self) -> list[dict[str, Any]]:
        """The history in its order, without W&B's own columns and what a run logs at its end."""
        lines = [self.lines[place] for place in sorted(self.lines)]
        plain = [{name: value for name, value in line.items() if not name.startswith("_")} for line in lines]
        return [row for row in plain if not any(name.startswith(ENDING) for name in row)]

    def of_type(self, kind: str) -> list[Artifact]:
        return [artifact for artifact in self.artifacts.values() if artifact.said["artifactTypeName"] == kind]


class Server(http.server.ThreadingHTTPServer):
    """Answers as `how` says; of the stream of rows, as `how_streaming` does. The question for `/` it always answers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, how: How, how_streaming: How | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.how, self.how_streaming = how, how_streaming or how
        self.arrived, self.over, self.lock = Arrived(), threading.Event(), threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes W&B use this server."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone."""


@contextmanager
def serving(how: How = "well", how_streaming: How | None = None) -> Iterator[Server]:
    """A server under way. At its end all that hangs is let go."""
    with Server(how, how_streaming) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _any(self) -> None:
        body = _body(self.rfile, self.headers)
        name = self.path if self.path != "/graphql" else _operation(json.loads(body)["query"])
        server = self.server
        how = "well" if name == "/" else server.how_streaming if name.endswith(STREAM) else server.how
        with server.lock:
            server.arrived.asked.append(name)
        if how == "hangs":
            server.over.wait(HANG_SECONDS)
        if how in ("hangs", "drops"):
            self.close_connection = True
            return
        with server.lock:
            answer = self._answer(name, body) if how == "well" else {"error": "in trouble"}
        self.send_response(200 if how == "well" else 500)
        data = json.dumps(answer).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = _any

    def _answer(self, name: str, body: bytes) -> dict[str, Any]:
        server = self.server
        if self.path == "/graphql":
            return {"data": _graphql(server, name, json.loads(body).get("variables") or {})}
        if name.endswith(STREAM):
            _stream(server.arrived, json.loads(body))
        elif self.command == "PUT" and (found := re.match(r"/artifact/(a\d+)/(.+)", self.path)):
            server.arrived.artifacts[found[1]].files[found[2]] = body
        elif self.command == "PUT":
            server.arrived.files[self.path.removeprefix("/file/")] = body
        return {}

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


def _body(file: Any, headers: Any) -> bytes:
    if headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(file.readline().split(b";")[0], 16):
            parts.append(file.read(size))
            file.readline()
        file.readline()
        body = b"".join(parts)
    else:
        body = file.read(int(headers.get("Content-Length") or 0))
    return gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body


def _operation(query: str) -> str:
    named = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
    assert named, query
    return named[1]


def _graphql(server: Server, name: str, said: dict[str, Any]) -> dict[str, Any]:
    """The answer to an operation: of the fields asked for, those without which wandb gives up."""
    if name == "UpsertBucket":
        return {"upsertBucket": _run(server.arrived, said)}
    if name == "CreateRunFiles":
        files = [{"name": file, "uploadUrl": f"{server.address}/file/{file}"} for file in said["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    if "Artifact" in name and name != "ArtifactType":
        return _of_artifacts(server, name, said.get("input", said))
    if name == "Heartbeat":
        trials, server.arrived.trials = server.arrived.trials[:1], server.arrived.trials[1:]
        return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps([_trial(values) for values in trials])}}
    known: dict[str, Any] = {
        "CreateAgent": {"createAgent": {"agent": {"id": "a"}}},
        "SweepWithRuns": {"project": {"sweep": {"id": "s", "config": server.arrived.sweep, "runs": {"edges": []}}}},
        "RunResumeStatus": {"model": _known(server.arrived)},
        "ArtifactType": {"project": {"artifact": None}},
        "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        "Viewer": {"viewer": {"id": "u", "entity": "someone", "username": "someone", "teams": {"edges": []}}},
    }
    answer: dict[str, Any] = known.get(name, {})
    return answer


def _trial(values: dict[str, Any]) -> dict[str, Any]:
    """What tells an agent to start a run."""
    args = {name: {"value": value} for name, value in values.items()}
    return {"id": "c", "type": "run", "run_id": "trial1", "program": "train.py", "args": args}


def _run(arrived: Arrived, said: dict[str, Any]) -> dict[str, Any]:
    """UpsertBucket: a run begins, or its config changes."""
    arrived.run = arrived.run or said
    arrived.config |= json.loads(said["config"] or "{}")
    project = {"id": "p", "name": said["project"], "entity": {"id": "e", "name": "someone"}}
    of_run = {key: said[key] for key in ("name", "displayName", "description", "config")}
    return {"bucket": {"id": "r", "sweepName": None, "historyLineCount": 0, "project": project} | of_run}


def _known(arrived: Arrived) -> dict[str, Any] | None:
    """RunResumeStatus: how far a run has come; None if there is no such run yet."""
    if not arrived.run:
        return None
    last = [json.dumps(arrived.lines[place]) for place in sorted(arrived.lines)[-1:]]
    counts = {"historyLineCount": len(arrived.lines), "eventsLineCount": 0, "logLineCount": 0}
    tails = {"historyTail": json.dumps(last), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
    said = {"config": json.dumps(arrived.config), "summaryMetrics": json.dumps(arrived.summary), "tags": None}
    names = {"name": arrived.run["name"], "displayName": arrived.run["displayName"], "notes": None}
    entity = {"id": "e", "name": "someone"}
    return {
        "id": "p",
        "name": arrived.run["project"],
        "entity": entity,
        "bucket": {"id": "r", **names, **counts, **tails, **said},
    }


def _of_artifacts(server: Server, name: str, said: dict[str, Any]) -> dict[str, Any]:
    """An artifact is created, its files are asked for and put, its manifest likewise; then it is committed."""
    artifacts = server.arrived.artifacts
    if name == "CreateArtifact":
        made = f"a{len(artifacts) + 1}"
        artifacts[made] = Artifact(said)
        return {"createArtifact": {"artifact": {"id": made, "state": "PENDING", "artifactSequence": {}}}}
    if name == "CreateArtifactFiles":
        nodes = []
        for file in said["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            where = {"storagePath": path, "uploadUrl": f"{server.address}/artifact/{path}", "uploadHeaders": []}
            nodes.append({"node": where | {"artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}
    if name in ("CreateArtifactManifest", "UpdateArtifactManifest"):
        made = said["artifactID"] if name.startswith("Create") else said["artifactManifestID"]
        file = {"id": "f", "uploadUrl": f"{server.address}/artifact/{made}/{said.get('name', 'manifest')}"}
        return {name[0].lower() + name[1:]: {"artifactManifest": {"id": made, "file": file | {"uploadHeaders": []}}}}
    if name == "CommitArtifact":
        artifacts[said["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": said["artifactID"], "digest": "d"}}}
    if name == "ArtifactByID":
        return {"artifact": _facts(said["id"], artifacts[said["id"]])}
    assert name == "UseArtifact", name
    server.arrived.used.append(said["artifactID"])
    return {"useArtifact": {"artifact": {"id": said["artifactID"], "digest": "d", "state": "COMMITTED"}}}


def _facts(made: str, artifact: Artifact) -> dict[str, Any]:
    """An artifact as W&B's Python reads it back."""
    said = artifact.said
    project = {
        "id": "p",
        "internalId": "p",
        "name": said["projectName"],
        "entity": {"id": "e", "name": said["entityName"]},
    }
    collection = {"__typename": "ArtifactSequence", "id": "s", "name": said["artifactCollectionName"]}
    nothing = {"description": None, "ttlDurationSeconds": 0, "ttlIsInherited": False, "tags": [], "updatedAt": None}
    return nothing | {
        "id": made,
        "artifactSequence": collection | {"project": project},
        "versionIndex": 0,
        "artifactType": {"name": said["artifactTypeName"]},
        "metadata": said["metadata"],
        "historyStep": said["historyStep"],
        "state": "COMMITTED",
        "size": sum(map(len, artifact.files.values())),
        "digest": said["digest"],
        "commitHash": "c",
        "fileCount": len(artifact.files) - 1,
        "createdAt": "2024-01-01T00:00:00",
        "aliases": [],
    }


def _stream(arrived: Arrived, said: dict[str, Any]) -> None:
    """Lines of files, each with its place: what is sent twice is there once."""
    for file, part in said.get("files", {}).items():
        rows = [json.loads(line) for line in part["content"]]
        if file == HISTORY:
            arrived.lines |= {part["offset"] + place: row for place, row in enumerate(rows)}
        elif file == SUMMARY:
            arrived.summary = rows[-1]
    arrived.complete |= bool(said.get("complete"))

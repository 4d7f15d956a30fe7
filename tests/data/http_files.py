"""A server of files that fails as it is told to."""

from __future__ import annotations

import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` are taken one a GET: 503, drop, short, wrong; `ranges` off = a plain old server."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.ranges = folder, [], True
        self.served: list[str] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        fault = self.server.faults.pop(0) if body and self.server.faults else ""
        if fault == "503" or not path.exists():
            self.send_response(503 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        first = 0
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        whole = len(data)
        if self.server.ranges and found:
            first, last = int(found[1]), int(found[2] or whole - 1)
            data, status = data[first : last + 1], 206
        if body:
            self.server.served.append(path.name)
            time.sleep(self.server.delay)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}")
        self.end_headers()
        if not body:
            return
        if fault == "wrong":
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)
        if fault == "drop":
            self.close_connection = True

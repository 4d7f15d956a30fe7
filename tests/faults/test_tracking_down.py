"""Row 20, and secrets: W&B that refuses the key or does not answer costs one warning; the key stands nowhere."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distcnn import tracking
from distcnn.runfolder import read_rows
from distcnn.tracking import unreachable
from tests.faults.ranks import Ranks, free_port
from tests.faults.runs import STEPS, flags, results
from tests.wandb_file import records
from tests.wandb_file import rows as rows_in

KEY = "0123456789abcdef0123456789abcdef01234567"  # looks like one


@contextmanager
def server(code: int) -> Iterator[tuple[str, list[str]]]:
    """(address of an HTTP server that answers `code` to all, the paths it was asked for)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.path)
            self.send_response(code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


def test_a_wrong_key_is_one_warning_and_the_run_is_tracked_offline(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = flags(images, run, "--wandb-mode", "online")
    with server(401) as (address, asked):
        secret = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address, "HOME": str(tmp_path)}
        with Ranks(tmp_path / "a", 1, words, environment=secret) as ranks:
            assert ranks.wait() == [0]
            said = [line for line in ranks.err().splitlines() if line.startswith("warning")]
        assert "/graphql" in asked, "the key must have been tried, or this proves nothing"
    assert len(said) == 1 and "W&B does not answer (" in said[0] and "): offline; " in said[0]
    assert results(run)["status"] == "complete"
    (offline,) = (run / "wandb").glob("offline-run-*")
    steps = [row["step"] for row in rows_in(records(offline)) if "train/loss" in row]
    assert steps == [row["step"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]
    assert len(steps) == STEPS
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holders == [], "the key stands in no file of the run, nor in what it printed"


@pytest.mark.parametrize(("code", "why"), [(500, "HTTP Error 500"), (503, "HTTP Error 503"), (404, ""), (401, "")])
def test_servers_that_answer(code: int, why: str) -> None:
    with server(code) as (address, _):
        assert why in unreachable(address) and bool(why) == bool(unreachable(address))


def test_servers_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, silent, not found, no address: soon known."""
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 0.3)
    assert "Connection refused" in unreachable(f"http://127.0.0.1:{free_port()}")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        assert "timed out" in unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 5
    assert unreachable("http://no-such-host.invalid") and unreachable("nonsense")

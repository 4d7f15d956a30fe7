from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from data_sets import index, write_idx
from shard_files import jpg, labelled, write_tar

from distcnn.errors import DataError
from distcnn.files import sha256_of


class _Server(BaseHTTPRequestHandler):
    """Files from memory; with byte ranges, or without as `python -m http.server` has them."""

    files: dict[str, bytes]
    ranges: bool
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        data = self.files.get(self.path)
        if data is None:
            self.send_error(500 if "broken" in self.path else 404)
            return
        wanted = self.headers.get("Range")
        self.requests.append(wanted or "all")
        if self.ranges and wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last or len(data)) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(files: dict[str, bytes], ranges: bool) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (_Server,), {"files": files, "ranges": ranges, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("block", [1 << 20, 4096])
def test_shards_over_http(tmp_path: Path, ranges: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file in one request, or in several."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("distcnn.data.sources.REMOTE_READ_AHEAD", block)
    big = [("big.cls", b"1"), ("big.jpg", jpg(7, 40, 40))]
    data = write_tar(tmp_path / "a.tar", [*labelled([0, 1]), *big]).read_bytes()
    with served({"/a.tar": data}, ranges) as (address, _):
        for verify in (False, True):
            manifest = index(tmp_path / f"set{verify}", f"{address}/a.tar", verify=verify)
            shard = manifest.split("train").shards[0]
            assert (shard.name, shard.bytes, shard.samples) == (f"{address}/a.tar", len(data), 3)
            assert manifest.split("train").class_counts == (1, 2)
        assert shard.sha256 == sha256_of(tmp_path / "a.tar")
        assert manifest.image.max_width == 40
        with pytest.raises(DataError, match=r"cannot read shard http://.*/b\.tar: 404"):
            index(tmp_path / "none", f"{address}/b.tar")
        with pytest.raises(DataError, match=r"cannot read shard http://.*/broken\.tar"):
            index(tmp_path / "none", f"{address}/broken.tar")
    with pytest.raises(DataError, match=r"cannot read shard http://"):
        index(tmp_path / "none", f"{address}/a.tar")


def test_shards_of_any_file_system_of_fsspec(tmp_path: Path) -> None:
    for number in range(3):
        path = write_tar(tmp_path / f"{number}.tar", labelled([number]))
        with fsspec.open(f"memory://bucket/t-{number}.tar", "wb") as file:
            file.write(path.read_bytes())
        write_idx(path)
        with fsspec.open(f"memory://bucket/t-{number}.idx", "wb") as file:
            file.write((tmp_path / f"{number}.idx").read_bytes())
    from distcnn.data.sources import expand

    shards = expand("memory://bucket/*.tar")
    assert shards == expand("memory://bucket/t-{0..2}.tar") == [f"memory://bucket/t-{n}.tar" for n in range(3)]
    manifest = index(tmp_path / "set", *shards, name="x")
    assert manifest == index(tmp_path / "idx", *shards, wds2idx=True, name="x")
    assert [shard.name for shard in manifest.split("train").shards] == shards
    assert manifest.split("train").class_counts == (1, 1, 1)
    assert index(tmp_path / "v", *shards, verify=True).image.uniform == (8, 8)

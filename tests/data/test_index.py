from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from shard_files import encode, hostile_pickle, jpg, labelled, picture, write_tar

from distcnn.cli import main
from distcnn.data.decode import decode
from distcnn.data.index import IndexRequest, index_data_set, with_rules
from distcnn.data.labels import LabelRule, parse_rule, read_classes
from distcnn.data.manifest import Manifest, load_manifest
from distcnn.data.shards import SplitReader
from distcnn.errors import DataError, UserError
from distcnn.files import sha256_of


def index(root: Path, *paths: Path | str, split: str = "train", **options: Any) -> Manifest:
    request = IndexRequest(root, {split: [str(path) for path in paths]}, workers=1, **options)
    manifest = index_data_set(request)
    assert load_manifest(root) == manifest
    return manifest


def contents(root: Path, manifest: Manifest, split: str = "train") -> list[tuple[str, int, bytes]]:
    """(key, label, image) of every sample, read the way that training reads."""
    reader = SplitReader(root, manifest.split(split))
    ids = np.arange(len(reader))
    keys = [key for _, key in reader.keys(ids)]
    return list(zip(keys, reader.labels(ids).tolist(), reader.read(ids), strict=True))


# ---- what is read ----


@pytest.mark.parametrize("sizes", [[1], [3, 0, 1, 40], [1] * 9])
def test_samples_come_in_the_order_of_the_shards_however_uneven(tmp_path: Path, sizes: list[int]) -> None:
    paths, expected, start = [], [], 0
    for number, size in enumerate(sizes):
        members = labelled([i % 3 for i in range(size)], start=start)
        paths.append(write_tar(tmp_path / f"s{number}.tar", members))
        expected += [(f"{start + i:04d}", i % 3, jpg(start + i)) for i in range(size)]
        start += size
    manifest = index(tmp_path / "set", *paths, classes=("a", "b", "c"))
    assert contents(tmp_path / "set", manifest) == expected
    assert [shard.samples for shard in manifest.split("train").shards] == [size for size in sizes if size]
    assert sum(manifest.split("train").class_counts) == sum(sizes)


def test_shards_below_the_root_keep_a_relative_name_others_their_path(tmp_path: Path) -> None:
    inside = write_tar(tmp_path / "set" / "shards" / "a.tar", labelled([0]))
    outside = write_tar(tmp_path / "b.tar", labelled([1]))
    manifest = index(tmp_path / "set", inside, outside)
    assert [shard.name for shard in manifest.split("train").shards] == ["shards/a.tar", str(outside)]
    assert all(shard.index.startswith("index/train-") for shard in manifest.split("train").shards)
    assert [shard.bytes for shard in manifest.split("train").shards] == [10240, 10240]
    assert manifest.classes == ("0", "1")
    assert manifest.name == "set"
    (tmp_path / "set").rename(tmp_path / "moved")
    assert len(contents(tmp_path / "moved", load_manifest(tmp_path / "moved"))) == 2


def as_json(value: Any) -> list[tuple[str, bytes]]:
    return [("d/a.jpg", jpg(1)), ("d/a.json", json.dumps(value).encode())]


@pytest.mark.parametrize(
    ("members", "rule", "classes", "expected"),
    [
        (labelled([2, 0]), "cls", ("0", "1", "2"), [2, 0]),
        ([("a.jpg", jpg()), ("a.cls", b" 1\n")], "cls", ("0", "1"), [1]),
        (as_json({"label": 1}), "label", ("0", "1"), [1]),
        (as_json({"label": "tit"}), "json:label", ("tit",), [0]),
        (as_json({"a": {"b": 1}}), "a.b", ("0", "1"), [1]),
        (as_json({"a": {"b": 1}, "a.b": 0}), "a.b", ("0",), [0]),
        (as_json({"cls": 1}), "json:cls", ("0", "1"), [1]),
        (as_json({}), "folder", ("d",), [0]),
        (as_json({}), "none", (), [-1]),
        (
            [("x/tit/1.jpg", jpg()), ("x/crow/1.jpg", jpg()), ("y/tit/2.png", jpg())],
            "folder",
            ("crow", "tit"),
            [1, 0, 1],
        ),
        ([("é/日本/1.jpg", jpg())], "folder", ("日本",), [0]),
    ],
)
def test_where_labels_come_from(
    tmp_path: Path, members: list[tuple[str, bytes]], rule: str, classes: tuple[str, ...], expected: list[int]
) -> None:
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    manifest = index(tmp_path, path, rule=parse_rule(rule))
    assert manifest.classes == classes
    assert [label for _, label, _ in contents(tmp_path, manifest)] == expected
    assert manifest.split("train").labelled == (rule != "none")


def test_class_names_by_file_set_the_order(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("b/1.jpg", jpg()), ("a/1.jpg", jpg(1))])
    for text in ("c\nb\n\na\n", '["c", "b", "a"]', "\ufeffc\r\nb\r\na"):
        (tmp_path / "classes.txt").write_text(text)
        classes = read_classes(tmp_path / "classes.txt")
        manifest = index(tmp_path, path, rule=parse_rule("folder"), classes=classes, overwrite=True)
        assert manifest.classes == ("c", "b", "a")
        assert manifest.split("train").class_counts == (0, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "no class names"), (b"a\na\n", "'a' twice"), (b"[1", "not a JSON list"), (b"\xff\xfe", "cannot read")],
)
def test_class_files_that_cannot_be_used(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "c").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "c")
    with pytest.raises(UserError, match="cannot read"):
        read_classes(tmp_path / "none")


def test_a_split_may_have_no_labels(tmp_path: Path) -> None:
    train = write_tar(tmp_path / "a.tar", labelled([0, 1]))
    test = write_tar(tmp_path / "t.tar", [("x.jpg", jpg())])
    request = IndexRequest(tmp_path, {"train": [str(train)], "test": [str(test)]}, workers=1)
    with pytest.raises(DataError, match=r"'x' has no \.cls.*--unlabelled"):
        index_data_set(request)
    manifest = index_data_set(with_rules(request, ["test"]))
    assert (manifest.split("train").class_counts, manifest.split("test").class_counts) == ((1, 1), ())
    assert [label for _, label, _ in contents(tmp_path, manifest, "test")] == [-1]
    with pytest.raises(UserError, match="no such split; there are train, test"):
        with_rules(request, ["tset"])


# ---- labels and keys that are wrong: an error that names shard and key ----


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([("k.jpg", b"1")], {}, r"has no \.cls"),
        ([("k.jpg", b"1"), ("k.cls", b"")], {}, "the label '', not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"cat")], {}, "the label 'cat', not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"1.0")], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"1_0")], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", "\u0661".encode())], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"\x80\x04\xff")], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"9" * 5000)], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"1" * (2 << 20))], {}, "over 1048576 bytes"),
        ([("k.jpg", b"1"), ("k.cls", b"-1")], {}, "the label -1, out of the range"),
        ([("k.jpg", b"1"), ("k.cls", b"2")], {"classes": ("a", "b")}, "the label 2, out of the range 0 to 1"),
        ([("k.jpg", b"1"), ("k.cls", b"1000000")], {}, "out of the range"),
        ([("k.jpg", b"1"), ("k.json", b"1")], {"rule": LabelRule("json", "label")}, "has no 'label' in its .json"),
        ([("k.jpg", b"1"), ("k.json", b"{")], {"rule": LabelRule("json", "label")}, "cannot be read"),
        ([("k.jpg", b"1"), ("k.json", b"[" * 99999)], {"rule": LabelRule("json", "label")}, "cannot be read"),
        (
            [("k.jpg", b"1"), ("k.json", b'{"a": 1, "b": 2}')],
            {"rule": LabelRule("json", "label")},
            "no 'label' in its .json; it has a, b",
        ),
        ([("k.jpg", b"1"), ("k.json", b'{"a": true}')], {"rule": LabelRule("json", "a")}, "the label True: neither"),
        ([("k.jpg", b"1"), ("k.json", b'{"a": 1.5}')], {"rule": LabelRule("json", "a")}, "neither"),
        ([("k.jpg", b"1"), ("k.json", b'{"a": ""}')], {"rule": LabelRule("json", "a")}, "neither"),
        (
            [("k.jpg", b"1"), ("k.json", b'{"a": "' + b"x" * 999 + b'\\n"}')],
            {"rule": LabelRule("json", "a.b")},
            "no 'a.b'",
        ),
        ([("k.jpg", b"1")], {"rule": LabelRule("folder")}, "has no folder"),
        (
            [("tit/k.jpg", b"1")],
            {"rule": LabelRule("folder"), "classes": ("tits", "crow")},
            "the class 'tit'; did you mean 'tits'",
        ),
        ([("k.jpg", b"1"), ("l.jpg", b"1"), ("k.cls", b"1")], {"rule": LabelRule("none")}, "not neighbours"),
        ([("k.jpg", b"1"), ("k.jpg", b"1")], {"rule": LabelRule("none")}, "comes twice"),
        (
            [("j.jpg", b"1"), ("j.json", b'{"a": 1}'), ("k.jpg", b"1"), ("k.json", b'{"a": "x"}')],
            {"rule": LabelRule("json", "a")},
            "numbers and names mixed",
        ),
    ],
)
def test_labels_and_keys_that_are_wrong(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict[str, Any], message: str
) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as raised:
        index(tmp_path / "set", path, **options)
    text = str(raised.value)
    assert "a.tar" in text
    assert "'k'" in text or "'tit/k'" in text
    assert "\n" not in text
    assert not (tmp_path / "set").exists(), "nothing is written before everything was read"


def test_names_in_one_shard_and_numbers_in_another(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", as_json({"a": 1}))
    two = write_tar(tmp_path / "b.tar", as_json({"a": "x"}))
    with pytest.raises(DataError, match=r"names in shard .*b\.tar and numbers in shard .*a\.tar"):
        index(tmp_path / "set", one, two, rule=LabelRule("json", "a"))


# ---- shards that are wrong ----


def broken_shards(folder: Path) -> dict[str, str]:
    """Bad shards by name, and what must be said of each."""
    whole = write_tar(folder / "whole.tar", labelled(range(4))).read_bytes()
    files = {
        "cut": whole[:3000],
        "empty": b"",
        "text": b"not a tar at all" * 100,
        "gz": gzip.compress(whole),
        "link": None,
        "evil": None,
    }
    with tarfile.open(folder / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    write_tar(folder / "evil.tar", [("../../a.jpg", b"1")])
    for name, data in files.items():
        if data is not None:
            (folder / f"{name}.tar").write_bytes(data)
    return {
        "missing": "is missing",
        "cut": "is truncated",
        "empty": r"is empty \(0 bytes\)",
        "text": "is not a tar file",
        "gz": "gzip-compressed.*run 'gunzip'",
        "link": "symbolic link.*refused",
        "evil": "points outside of the archive: refused",
    }


def test_bad_shards_are_named_or_quarantined(tmp_path: Path) -> None:
    messages = broken_shards(tmp_path)
    good = tmp_path / "whole.tar"
    for name, message in messages.items():
        bad = tmp_path / f"{name}.tar"
        with pytest.raises(DataError, match=message) as raised:
            index(tmp_path / "set", good, bad)
        assert str(bad) in str(raised.value)
        assert not (tmp_path / "set").exists()
    bad = [tmp_path / f"{name}.tar" for name in messages]
    with pytest.raises(DataError, match=r"and 6 more shards; --skip-bad-shards"):
        index(tmp_path / "set", *bad, good)
    manifest = index(tmp_path / "set", *bad, good, skip_bad_shards=True)
    assert manifest.split("train").samples == 4
    assert {row.name: row.split for row in manifest.quarantined} == {str(path): "train" for path in bad}
    with pytest.raises(DataError, match=r"'train' has no usable sample in its 7 shards \(first: .*missing"):
        index(tmp_path / "set2", *bad, skip_bad_shards=True)


def test_images_that_headers_show_to_be_bad(tmp_path: Path) -> None:
    members = [("a.cls", b"0"), ("a.jpg", b""), ("b.cls", b"0"), ("c.json", b"{}"), ("c.cls", b"x"), *labelled([0])]
    manifest = index(tmp_path, write_tar(tmp_path / "a.tar", members))
    assert [(row.name, row.reason) for row in manifest.quarantined] == [
        ("a.tar/a.jpg", "0 bytes"),
        ("a.tar/b", "no image beside its .cls"),
        ("a.tar/c", "no image beside its .json, .cls"),
    ]
    assert manifest.split("train").samples == 1


# ---- verification ----


def test_verify_quarantines_what_does_not_decode(tmp_path: Path) -> None:
    good = [picture(seed, 10 + seed, 20) for seed in range(3)]
    members = []
    for number, image in enumerate(good):
        members += [(f"{number}.cls", b"0"), (f"{number}.png", encode(image))]
    bad = {
        "text.jpg": b"this is text",
        "cut.jpg": jpg(0, 64, 64)[:-300],
        "zero.png": b"",
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "pickle.jpg": b"\x80\x04K\x01.",
    }
    for name, data in bad.items():
        members += [(name, data), (name.split(".")[0] + ".cls", b"0")]
    path = write_tar(tmp_path / "a.tar", members)
    plain = index(tmp_path, path)
    assert plain.image.mean == ()
    assert plain.split("train").shards[0].sha256 == ""
    manifest = index(tmp_path, path, verify=True, overwrite=True)
    assert [row.name.rpartition("/")[2].split(".")[0] for row in manifest.quarantined] == [
        "zero",
        "text",
        "cut",
        "eps",
        "pickle",
    ]
    assert [key for key, _, _ in contents(tmp_path, manifest)] == ["0", "1", "2"]
    rows = SplitReader(tmp_path, manifest.split("train")).index(0)
    assert list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)) == [(20, 10), (20, 11), (20, 12)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in good]) / 255
    assert np.allclose(manifest.image.mean, pixels.mean(axis=0), atol=1e-6)
    assert np.allclose(manifest.image.std, pixels.std(axis=0), atol=1e-6)
    assert (manifest.image.min_height, manifest.image.max_height, manifest.image.uniform) == (10, 12, None)
    assert manifest.split("train").shards[0].sha256 == sha256_of(path)
    assert manifest.split("train").class_counts == (3,)


def test_verify_in_processes_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.index.BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr("distcnn.data.sweep.CHUNK_IMAGES", 4)
    members = labelled(range(11))
    members[7] = ("0003.jpg", b"bad")
    paths = [str(write_tar(tmp_path / f"{n}.tar", members)) for n in range(2)]
    one = index_data_set(IndexRequest(tmp_path / "one", {"train": paths}, verify=True, workers=1, name="x"))
    two = index_data_set(IndexRequest(tmp_path / "two", {"train": paths}, verify=True, workers=2, name="x"))
    assert one == two
    assert [row.name for row in one.quarantined] == [f"{path}/0003" for path in paths]


# ---- what is written, and when ----


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", labelled([0, 1]))
    first = index(tmp_path, path)
    with pytest.raises(UserError, match="exists: give another --output, or --overwrite"):
        index(tmp_path, path)
    assert load_manifest(tmp_path) == first
    write_tar(tmp_path / "b.tar", labelled([0]))
    second = index(tmp_path, tmp_path / "b.tar", overwrite=True)
    assert [file.name for file in (tmp_path / "index").iterdir()] == [
        shard.index.removeprefix("index/") for shard in second.split("train").shards
    ]
    assert path.exists(), "tars are never touched"


def test_killed_before_the_manifest_the_old_set_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", labelled([0, 1]))
    first = index(tmp_path, path)
    before = contents(tmp_path, first)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write_tar(tmp_path / "b.tar", labelled([1, 0, 1]))
    monkeypatch.setattr("distcnn.data.index.save_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path, tmp_path / "b.tar", overwrite=True)
    assert contents(tmp_path, load_manifest(tmp_path)) == before


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", labelled([0]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distcnn.data.index.write_atomically", full)
    with pytest.raises(UserError, match=r"cannot write to .*/set: No space left"):
        index(tmp_path / "set", path)
    assert not (tmp_path / "set" / "dataset.json").exists()


# ---- wds2idx ----


def write_idx(path: Path, version: str = "v1.2") -> Path:
    """What DALI's wds2idx writes for a tar."""
    lines: list[list[str]] = []
    with tarfile.open(path) as tar:
        last = ""
        for info in tar.getmembers():
            key, _, extension = info.name.partition(".")
            if key != last:
                lines.append([])
            last = key
            lines[-1] += [extension, str(info.offset_data), str(info.size), info.name]
    out = path.with_name(path.name.split(".")[0] + ".idx")
    out.write_text("\n".join([f"{version} {len(lines)}", *(" ".join(line) for line in lines)]) + "\n")
    return out


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_wds2idx_gives_what_the_headers_give(tmp_path: Path, form: int) -> None:
    members = [*labelled(range(5)), ("d/" * 60 + "x.jpg", jpg(9)), ("d/" * 60 + "x.cls", b"1"), ("n.txt", b"no")]
    path = write_tar(tmp_path / "shard-0.x.tar", members, form)
    write_idx(path)
    by_headers = index(tmp_path / "one", path, name="x")
    by_index = index(tmp_path / "two", path, name="x", wds2idx=True)
    assert by_headers == by_index
    assert contents(tmp_path / "one", by_headers) == contents(tmp_path / "two", by_index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a\.idx is missing"),
        ("", "does not begin with 'v1.2"),
        ("v1.1 1\njpg 512 3\n", "v1.1 has no names"),
        ("v1.2 2\njpg 512 3 a.jpg\n", "truncated: 1 of 2"),
        ("v1.2 1\njpg 512 3\n", "line 2: not"),
        ("v1.2 1\njpg 512 3 a b.jpg\n", "line 2: not.*blanks"),
        ("v1.2 1\njpg x 3 a.jpg\n", "line 2: not"),
        ("v1.2 1\njpg 512 4 a.jpg\n", "does not fit shard"),
        ("v1.2 1\njpg 1024 3 a.jpg\n", "does not fit shard"),
        ("v1.2 1\njpg 513 3 a.jpg\n", "does not fit shard"),
        ("v1.2 1\njpg 0 3 a.jpg\n", "does not fit shard"),
        ("v1.2 1\njpg 512 99999 a.jpg\n", "does not fit shard"),
        ("v1.2 1\njpg 512 3 /a.jpg\n", "points outside"),
        ("v1.2 1\njpg 512 3 ../a.jpg\n", "points outside"),
        ("v1.2 1\njpg 512 3 a.jpg\n", None),
    ],
)
def test_a_wds2idx_file_that_does_not_fit_is_refused(tmp_path: Path, text: str | None, message: str | None) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"xyz")])
    if text is not None:
        (tmp_path / "a.idx").write_text(text)
    if message is None:
        assert index(tmp_path, path, wds2idx=True, rule=LabelRule("none")).split("train").samples == 1
        return
    with pytest.raises(DataError, match=message) as raised:
        index(tmp_path, path, wds2idx=True, rule=LabelRule("none"))
    assert "a.idx" in str(raised.value)


# ---- remote ----


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


# ---- nothing of a shard is run ----


def test_pickles_in_a_shard_are_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = hostile_pickle(trace)
    buffer = io.BytesIO()
    np.save(buffer, np.array([0]))
    members = []
    for extension in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "msg", "cbor", "mp", "x.pyd"):
        members.append((f"a.{extension}", payload))
    members += [("a.cls", b"0"), ("a.jpg", jpg()), ("b.jpg", payload), ("b.cls", b"0"), ("b.pkl", payload)]
    path = write_tar(tmp_path / "a.tar", members)
    manifest = index(tmp_path, path, verify=True)
    assert [row.name for row in manifest.quarantined] == ["a.tar/b"]
    assert not trace.exists()
    for extension, rule in (("cls", "cls"), ("json", "label")):
        path = write_tar(tmp_path / "b.tar", [("a.jpg", jpg()), (f"a.{extension}", payload)])
        with pytest.raises(DataError, match="'a'"):
            index(tmp_path / "no", path, rule=parse_rule(rule))
    assert not trace.exists()


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_tar(tmp_path / f"t-{number}.tar", labelled([0, 1, 1]))
    write_tar(tmp_path / "v.tar", [("x.jpg", jpg())])
    (tmp_path / "classes.txt").write_text("crow\ntit\n")
    flags = ["--output", f"{tmp_path}/set/dataset.json", "--classes", f"{tmp_path}/classes.txt", "--verify"]
    patterns = [f"{tmp_path}/t-{{0..1}}.tar::{tmp_path}/t-[2].tar", f"extra={tmp_path}/v.tar"]
    assert main(["index", *patterns, *flags, "--unlabelled", "extra"]) == 0
    out = capsys.readouterr().out
    assert "train          9 images in 3 shards, 2 classes" in out
    assert "extra          1 images in 1 shards, no labels" in out
    assert "distcnn inspect" in out
    manifest = load_manifest(tmp_path / "set")
    assert manifest.classes == ("crow", "tit")
    assert manifest.split("train").class_counts == (3, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the shards"),
        (["pipe:cat x.tar"], "is a command"),
        (["train=pipe:cat x.tar"], "is a command"),
        (["/no/such.tar"], "is missing"),
        (["/no/such.tar", "--label", ""], "--label takes"),
        (["/no/such.tar", "--split", "a/b"], "--split 'a/b'"),
        (["/no/such.tar", "--classes", "/no/such.txt"], "cannot read the class names"),
        (["/no/such.tar", "val=/no/such.tar"], "named twice"),
        (["/no/such.tar", "--unlabelled", "test"], "no such split"),
        (["/no/such.tar", "--verfy"], "--verify"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["index", *words, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_output_is_a_folder_or_its_dataset_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "/no/such.tar", "--output", f"{tmp_path}/other.json"]) == 2
    assert "the file is called dataset.json" in capsys.readouterr().err


def test_sizes_come_from_the_pixels_not_from_the_name(tmp_path: Path) -> None:
    """A PNG named .jpg, and CMYK, are images like others."""
    from PIL import Image

    members = [
        ("a.jpg", encode(picture(0, 5, 7))),
        ("b.jpg", encode(Image.new("CMYK", (3, 2)), "JPEG")),
        ("c.png", encode(np.full((4, 4), 60_000, np.uint16))),
    ]
    manifest = index(tmp_path, write_tar(tmp_path / "a.tar", members), rule=LabelRule("none"), verify=True)
    rows = SplitReader(tmp_path, manifest.split("train")).index(0)
    assert list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)) == [(7, 5), (3, 2), (4, 4)]
    assert decode(contents(tmp_path, manifest)[2][2])[0, 0].tolist() == [60_000 >> 8] * 3

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from shard_files import hostile_pickle, labelled, write_tar

from distcnn.data.manifest import Shard, Split
from distcnn.data.shards import (
    MAX_KEY_BYTES,
    SplitReader,
    index_dtype,
    load_index,
    make_index,
    resolve_local,
    samples_in,
    split_name,
)
from distcnn.errors import DataError
from tests.support import in_threads

NAMES = [
    ("a.jpg", ("a", "jpg")),
    ("d/e/a.jpg", ("d/e/a", "jpg")),
    ("d.x/a.JPG", ("d.x/a", "jpg")),
    ("a.seg.png", ("a", "seg.png")),
    ("a", ("a", "")),
    ("d/.hidden", ("d/", "hidden")),
    (".jpg", ("", "jpg")),
    ("n01_1.5.jpeg", ("n01_1", "5.jpeg")),
]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_split_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_split_name_agrees_with_webdataset() -> None:
    from webdataset.tariterators import base_plus_ext

    for name, (key, extension) in NAMES:
        if key and extension:
            assert base_plus_ext(name.lower()) == (key, extension)
        else:
            assert base_plus_ext(name) == (None, None)


def keys(path: Path) -> list[tuple[str, list[str]]]:
    return [(sample.key, sorted(sample.members)) for sample in samples_in(path)]


def test_groups_neighbours_and_passes_over_the_rest(tmp_path: Path) -> None:
    members = [
        ("README", b""),
        ("d/a.jpg", b""),
        ("d/a.cls", b""),
        ("d/a.pth", b""),  # never looked at, whatever it holds
        ("d/a.seg.png", b""),
        ("d/._a.jpg", b""),  # macOS leaves such
        ("d/.jpg", b""),
        ("e/a.PNG", b""),
        ("b.json", b""),
        ("b.txt", b""),
        ("c.txt", b""),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    assert keys(path) == [("d/a", ["cls", "jpg"]), ("e/a", ["png"]), ("b", ["json"])]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.cls"], "'a' comes twice or its members are not neighbours"),
        (["a.jpg", "b.jpg", "a.jpg"], "'a' comes twice or its members are not neighbours"),
        (["a.jpg", "a.jpg"], "'a' comes twice: it has two .jpg"),
        (["a.jpg", "a.cls", "a.JPG"], "'a' comes twice: it has two .jpg"),
        (["k" * (MAX_KEY_BYTES + 1) + ".jpg"], "longer than 1024 bytes"),
        (["é" * (MAX_KEY_BYTES // 2 + 1) + ".jpg"], "longer than 1024 bytes"),
    ],
)
def test_keys_must_be_unique_and_their_members_together(tmp_path: Path, names: list[str], message: str) -> None:
    import tarfile

    path = write_tar(tmp_path / "x.tar", [(name, b"1") for name in names], tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=message) as raised:
        list(samples_in(path))
    assert str(path) in str(raised.value)


def test_image_is_one_of_the_allowed_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.webp", b"1"), ("b.cls", b"1"), ("c.png", b"1"), ("c.jpg", b"22")])
    images = [sample.image for sample in samples_in(path)]
    assert [image and image.name for image in images] == ["a.webp", None, "c.jpg"]


def test_index_rows_hold_what_they_are_given() -> None:
    rows = make_index([(512, 7, 3, 0, 0, "é/a"), (2048, 1 << 40, -1, 9, 8, "b\udcff")])
    assert rows["key"][0].decode() == "é/a"
    assert rows["key"][1].decode("utf-8", "surrogateescape") == "b\udcff"
    assert rows["size"].tolist() == [7, 1 << 40]
    assert rows[["label", "width", "height"]].tolist() == [(3, 0, 0), (-1, 9, 8)]
    assert make_index([]).shape == (0,)


def write(path: Path, content: object) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with path.open("wb") as file:
            np.save(file, content)  # type: ignore[arg-type]


ROWS = make_index([(512, 7, 3, 0, 0, "a"), (1536, 8, 3, 0, 0, "b")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROWS[:1], "not the one of shard"),
        (ROWS["offset"], "not the one of shard"),
        (ROWS[["offset", "size"]], "not the one of shard"),
        (ROWS.astype([(name, "<i8") for name in ROWS.dtype.names[:5]] + [("key", "S1")]), "not the one of shard"),
        (ROWS[:, None], "not the one of shard"),
        (b"", "cannot be read"),
        (b"\x93NUMPY", "cannot be read"),
        (b"rubbish" * 99, "cannot be read"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write(tmp_path / "i.npy", content)
    with pytest.raises(DataError, match=message) as raised:
        load_index(tmp_path / "i.npy", Shard("x.tar", "i.npy", 2, 9999))
    assert "x.tar" in str(raised.value)


def test_a_cut_or_missing_or_zipped_index_is_refused(tmp_path: Path) -> None:
    shard = Shard("x.tar", "i.npy", 2, 9999)
    with pytest.raises(DataError, match="cannot be read"):
        load_index(tmp_path / "i.npy", shard)
    write(tmp_path / "i.npy", ROWS)
    assert load_index(tmp_path / "i.npy", shard)["key"].tolist() == [b"a", b"b"]
    data = (tmp_path / "i.npy").read_bytes()
    write(tmp_path / "i.npy", data[:-1])
    with pytest.raises(DataError, match="cannot be read"):
        load_index(tmp_path / "i.npy", shard)
    np.savez(tmp_path / "z.npz", ROWS)
    with pytest.raises(DataError, match="not the one of shard"):
        load_index(tmp_path / "z.npz", shard)


def test_a_pickled_index_is_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "i.npy").write_bytes(hostile_pickle(trace))
    with pytest.raises(DataError, match="cannot be read"):
        load_index(tmp_path / "i.npy", Shard("x.tar", "i.npy", 2, 9999))
    assert not trace.exists()


# ---- reading by sample id ----


def make_split(root: Path, sizes: list[int]) -> Split:
    shards = []
    for number, size in enumerate(sizes):
        members = [(f"{i}.jpg", f"{number}/{i}".encode()) for i in range(size)]
        path = write_tar(root / f"{number}.tar", members)
        samples = [(s.image.offset, s.image.size, number, 0, 0, s.key) for s in samples_in(path) if s.image]
        write(root / f"{number}.npy", make_index(samples))
        shards.append(Shard(f"{number}.tar", f"{number}.npy", size, path.stat().st_size))
    return Split(tuple(shards))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [5, 0, 1, 7], [0, 0, 3], [40, 1, 1]])
def test_reads_in_the_order_of_the_ids(tmp_path: Path, sizes: list[int]) -> None:
    reader = SplitReader(tmp_path, make_split(tmp_path, sizes))
    expected = [f"{shard}/{row}" for shard, size in enumerate(sizes) for row in range(size)]
    assert len(reader) == len(expected)
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(expected)), 2))
    assert [data.decode() for data in reader.read(ids)] == [expected[i] for i in ids]
    assert reader.labels(ids).tolist() == [int(expected[i].split("/")[0]) for i in ids]
    assert reader.keys(ids) == [(f"{e.split('/')[0]}.tar", e.split("/")[1]) for e in (expected[i] for i in ids)]
    assert reader.read(ids[:0]) == []
    reader.close()
    assert len(reader.read(ids)) == len(ids)


def open_shards(folder: Path) -> list[Path]:
    """The tars in `folder` that this process holds open: a failed test's traceback may hold another's."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(descriptor.readlink())
    return [name for name in names if name.suffix == ".tar" and name.is_relative_to(folder)]


def test_many_threads_read_more_shards_than_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.shards.OPEN_FILES", 2)
    sizes = [3] * 12
    reader = SplitReader(tmp_path, make_split(tmp_path, sizes))
    wrong: list[object] = []

    def work(seed: int) -> None:
        for _ in range(30):
            ids = np.random.default_rng(seed).integers(0, 36, 20)
            got = [data.decode() for data in reader.read(ids)]
            if got != [f"{i // 3}/{i % 3}" for i in ids]:
                wrong.append(got)

    in_threads(work, 6)
    assert not wrong
    assert len(open_shards(tmp_path)) == 2
    reader.close()
    assert not open_shards(tmp_path)


def test_a_shard_cut_or_taken_away_after_indexing_is_named(tmp_path: Path) -> None:
    split = make_split(tmp_path, [2, 2])
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:1537])
    reader = SplitReader(tmp_path, split)
    with pytest.raises(DataError, match=r"shard 1\.tar ends within sample '1'"):
        reader.read(np.array([0, 3]))
    (tmp_path / "0.tar").unlink()
    with pytest.raises(DataError, match=r"cannot open shard .*0\.tar"):
        SplitReader(tmp_path, split).read(np.array([0]))


def test_a_remote_shard_must_have_been_fetched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://b/x\.tar is remote"):
        resolve_local(tmp_path, Shard("s3://b/x.tar", "i.npy", 1, 1))


def test_row_layout_is_pinned() -> None:
    """Indexes on disk outlive the program: changing this needs a new version of the manifest."""
    assert index_dtype(5).descr == [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("label", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("key", "|S5"),
    ]
    assert len(labelled([1, 2])) == 4

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from shard_files import write_tar

from distcnn.data.tar import BLOCK, HOP, Member, file_reader, iterate_members, members_from
from distcnn.errors import DataError


def read(data: bytes) -> list[Member]:
    return list(members_from(file_reader(io.BytesIO(data), len(data)), len(data), "x.tar"))


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **info_fields: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in info_fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: bytes = b"a.jpg", size: bytes = b"00000000005", kind: bytes = b"0") -> bytes:
    """A header by hand, with its checksum."""
    raw = bytearray(BLOCK)
    raw[: len(name)], raw[124 : 124 + len(size)], raw[156:157], raw[257:265] = name, size, kind, b"ustar\x0000"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def member(data: bytes = b"hello", **fields: bytes) -> bytes:
    return header(**fields) + data + bytes(-len(data) % BLOCK)


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records:
        tail = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        length = next(n for n in range(len(tail), len(tail) + 9) if n == len(tail) + len(str(n)))
        body += str(length).encode() + tail
    return member(body, name=b"pax", size=b"%011o" % len(body), kind=kind)


END = bytes(2 * BLOCK)


# ---- agreement with Python's tarfile ----

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)
archives = st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=8)


@given(archives, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans())
@example([("a" * 101 + ".jpg", b"x"), ("d/" * 60 + "b.jpg", b"")], tarfile.GNU_FORMAT, False)
@example([("p/" * 70 + "b" * 80, b"x" * 512)], tarfile.USTAR_FORMAT, False)
@example([("\x80/", b"")], tarfile.PAX_FORMAT, False)
@example([("x=y\n7 path=z", b"1"), ("é/日本.jpg", b"2"), (" ", b"")], tarfile.PAX_FORMAT, True)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_agrees_with_tarfile(members: list[tuple[str, bytes]], form: int, float_time: bool) -> None:
    assume(not any(name.startswith("/") or ".." in name.split("/") for name, _ in members))
    try:
        data = tar_of(members, form, mtime=1.5 if float_time else 0)
    except (ValueError, UnicodeEncodeError):
        assume(False)  # a name that ustar cannot hold
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [
            (info.name.removeprefix("./"), info.offset_data, info.size) for info in tar.getmembers() if info.isreg()
        ]
    assert read(data) == expected
    assert [data[m.offset : m.offset + m.size] for m in read(data)] == [content for _, content in members]


@given(archives.filter(len), st.data())
@settings(max_examples=200, deadline=None)
def test_never_raises_anything_but_data_errors(members: list[tuple[str, bytes]], draw: st.DataObject) -> None:
    data = bytearray(tar_of([(f"{i}.jpg", content) for i, (_, content) in enumerate(members)], tarfile.PAX_FORMAT))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        found = read(bytes(data))
    except DataError:
        return
    assert all(m.offset >= BLOCK and m.size >= 0 and m.offset + m.size <= len(data) for m in found)


def test_undecodable_names_keep_their_bytes() -> None:
    data = member(name=b"\xff\xfe.jpg") + END
    assert read(data)[0].name.encode("utf-8", "surrogateescape") == b"\xff\xfe.jpg"


# ---- what is not a whole, plain tar ----

WHOLE = tar_of([("a.jpg", b"x" * 700), ("a.cls", b"1"), ("b.jpg", b""), ("c.jpg", b"y" * 512)])


def test_every_cut_is_noticed() -> None:
    blocks = 4 + 2 + 1 + 0 + 1  # headers and data
    for cut in range(0, (blocks + 1) * BLOCK, 64):
        with pytest.raises(DataError, match=r"x\.tar"):
            read(WHOLE[:cut])
    assert len(read(WHOLE[: (blocks + 1) * BLOCK])) == 4  # one block of the end marker is enough


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"x", "not a tar file"),
        (b"hello " * 1000, "not a tar file"),
        (b"\xff\xd8\xff\xe0" + bytes(2000), "not a tar file"),
        (gzip.compress(WHOLE), "gzip-compressed.*'gunzip'"),
        (bz2.compress(WHOLE), "bzip2-compressed.*'bunzip2'"),
        (lzma.compress(WHOLE), "xz-compressed.*'unxz'"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd-compressed.*'unzstd'"),
        (WHOLE[: 8 * BLOCK], "no end-of-archive marker.*truncate -s"),
        (WHOLE[:1000], "needs 700 bytes, 488 are left"),
        (WHOLE[: 3 * BLOCK + 100], "truncated at byte 1636"),
        (WHOLE + WHOLE, "second archive.*'tar --concatenate'"),
        (WHOLE + b"\1" * 2000, None),  # rubbish behind the end is no archive: tar ignores it as well
        (WHOLE[:3] + b"!" + WHOLE[4:], "not a tar file"),
        (WHOLE[: 3 * BLOCK + 5] + b"!" + WHOLE[3 * BLOCK + 6 :], "bad header checksum at byte 1536"),
        (member(name=b"/etc/passwd.jpg") + END, "points outside"),
        (member(name=b"../a.jpg") + END, "points outside"),
        (member(name=b"a/../../b.jpg") + END, "points outside"),
        (member(name=b"a/..") + END, "points outside"),
        (member(name=b"..a/b..jpg") + END, None),
        (member(kind=b"1", size=b"0", data=b"") + END, "a hard link"),
        (member(kind=b"2", size=b"0", data=b"") + END, "a symbolic link"),
        (member(kind=b"3", size=b"0", data=b"") + END, "a device"),
        (member(kind=b"4", size=b"0", data=b"") + END, "a device"),
        (member(kind=b"6", size=b"0", data=b"") + END, "a FIFO"),
        (member(kind=b"S") + END, "of type 'S'"),
        (member(kind=b"V") + END, "of type 'V'"),
        (member(kind=b"7") + END, None),
        (member(size=b"-0000000001") + END, "bad size"),
        (member(size=b"0000000009x") + END, "bad size"),
        (member(size=b"\xff" * 12) + END, "bad size"),
        (member(size=b"\x80" + (1 << 40).to_bytes(11, "big")) + END, "needs 1099511627776 bytes"),
        (member(size=b"", data=b"") + END, None),
        (pax(("size", "5")) + member(size=b"77777777777") + END, None),
        (pax(("size", "0")) + member(data=b"") + END, None),
        (pax(("size", "-5")) + member() + END, "bad PAX size"),
        (pax(("size", "x")) + member() + END, "bad PAX size"),
        (pax(("size", "9" * 5000)) + member() + END, "bad PAX size"),
        (pax(("path", "/a.jpg")) + member() + END, "points outside"),
        (pax(("path", "b/../../a.jpg"), kind=b"g") + member() + END, "points outside"),
        (pax(("GNU.sparse.major", "1"), ("path", "a")) + member() + END, "sparse"),
        (member(b"zz path=a", kind=b"x", size=b"%011o" % 9) + member() + END, "bad PAX record"),
        (member(b"99 path=a\n", kind=b"x", size=b"%011o" % 10) + member() + END, "bad PAX record"),
        (member(b"0 path=a\n", kind=b"x", size=b"%011o" % 9) + member() + END, "bad PAX record"),
        (header(kind=b"x", size=b"00100000000") + bytes(1 << 25), "not a sane tar"),
        (header(kind=b"L", size=b"00000200001") + bytes(1 << 20), "not a sane tar"),
        (pax(("path", "b.jpg")), "truncated"),
    ],
)
def test_ugly_files(data: bytes, message: str | None) -> None:
    if message is None:
        assert read(data)
    else:
        with pytest.raises(DataError, match=message) as raised:
            read(data)
        assert "x.tar" in str(raised.value) and "\n" not in str(raised.value)


def test_records_hold_for_the_next_member_or_for_all() -> None:
    data = pax(("path", "long.jpg")) + member() + member(name=b"b.jpg") + END
    assert [m.name for m in read(data)] == ["long.jpg", "b.jpg"]
    data = pax(("path", "all.jpg"), kind=b"g") + member() + pax(("path", "one.jpg")) + member() + member() + END
    assert [m.name for m in read(data)] == ["all.jpg", "one.jpg", "all.jpg"]
    data = member(b"gnu.jpg\0rubbish", kind=b"L", size=b"%011o" % 15) + member() + member() + END
    assert [m.name for m in read(data)] == ["gnu.jpg", "a.jpg"]


def test_directories_have_no_data_whatever_their_size_says() -> None:
    folder = header(name=b"d/", kind=b"5", size=b"00000001000")
    old_folder = header(name=b"e/", kind=b"\0", size=b"00000001000")
    assert [m.name for m in read(folder + member(name=b"d/a.jpg") + old_folder + member() + END)] == [
        "d/a.jpg",
        "a.jpg",
    ]


def test_old_signed_checksum() -> None:
    raw = bytearray(header(name=b"\xe9.jpg"))
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(struct.unpack("512b", raw))
    assert len(read(bytes(raw) + b"hello".ljust(BLOCK, b"\0") + END)) == 1


def test_sizes_of_8_gib_and_more() -> None:
    """Base 256; the file is not made: what is asked for is the header, and then the block after 8 GiB."""
    size = 9 << 30
    blocks = {0: header(size=b"\x80" + size.to_bytes(11, "big")), BLOCK + size: bytes(BLOCK)}

    def at(offset: int, length: int) -> bytes:
        return blocks.get(offset, b"")

    assert list(members_from(at, size + 3 * BLOCK, "x.tar")) == [("a.jpg", BLOCK, size)]


@pytest.mark.parametrize("size", [0, 100, HOP, 3 * HOP, 70_000, 300_000])
def test_reader_gives_the_file_s_bytes(size: int) -> None:
    """Hops and reads ahead of any size, forwards and back."""
    data = bytes(i * 7 % 256 for i in range(size))
    at = file_reader(io.BytesIO(data), size)
    for offset in [0, 512, 513, 4000, 5000, 4096, 65536, 66000, 200_000, 299_990, 10, 0]:
        for length in (1, 512, 5000):
            assert at(offset, length) == data[offset : offset + length]


@pytest.mark.parametrize("what", ["nothing", "folder"])
def test_what_cannot_be_opened_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.tar"
    if what == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"cannot read shard .*x\.tar"):
        list(iterate_members(path))


def test_reads_a_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("./a.jpg", b"1"), ("b.jpg", b"22")])
    assert [(m.name, m.size) for m in iterate_members(path)] == [("a.jpg", 1), ("b.jpg", 2)]

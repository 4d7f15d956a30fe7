from __future__ import annotations

from pathlib import Path

import pytest
from shard_files import write_tar

from distcnn.data.sources import expand, open_shard, read_small
from distcnn.errors import DataError, UserError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("/x/a.tar", ["/x/a.tar"]),
        ("/x/y/../a.tar", ["/x/a.tar"]),
        ("file:///x/a.tar", ["/x/a.tar"]),
        ("/x/{00..02}.tar", ["/x/00.tar", "/x/01.tar", "/x/02.tar"]),
        ("/x/{8..11}.tar", ["/x/8.tar", "/x/9.tar", "/x/10.tar", "/x/11.tar"]),
        ("/x/{098..101}", ["/x/098", "/x/099", "/x/100", "/x/101"]),
        ("/x/{2..0}", ["/x/2", "/x/1", "/x/0"]),
        ("/x/{3..3}", ["/x/3"]),
        ("/x/{a,b}{0..1}.tar", ["/x/a0.tar", "/x/a1.tar", "/x/b0.tar", "/x/b1.tar"]),
        ("/x/a::/y/{0..1}", ["/x/a", "/y/0", "/y/1"]),
        ("s3://b/t-{0..1}.tar::/x/a", ["s3://b/t-0.tar", "s3://b/t-1.tar", "/x/a"]),
        ("https://h.example/a.tar", ["https://h.example/a.tar"]),
        ("/x/$(touch y).tar", ["/x/$(touch y).tar"]),  # a name like any other: no shell ever sees it
        ("/x/a;b&c.tar", ["/x/a;b&c.tar"]),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert expand(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "empty pattern"),
        ("/x/a::", "empty pattern"),
        ("pipe:cat /x/a.tar", "is a command"),
        ("PIPE:cat x", "is a command"),
        ("/x/a.tar::pipe:curl x", "is a command"),
        ("| cat x", "is a command"),
        ("cat x |", "is a command"),
        ("!cat x", "is a command"),
        ("ssh://h/x.tar", "ssh: is refused"),
        ("shell://x", "shell: is refused"),
        ("s3+pipe://x", r"s3\+pipe: is refused"),
        ("ftp://h/x.tar", "ftp: is refused"),
        ("gopen:x", "gopen: is refused"),
        ("/x/{0..2.tar", "do not pair or that nest"),
        ("/x/{a,{b,c}}.tar", "do not pair or that nest"),
        ("/x/{0..9999999}.tar", "more than 1000000"),
        ("/x/{0..99999}{0..99999}.tar", "more than 1000000"),
        ("/x/a.tar::/x/a.tar", "named twice"),
        ("/x/{a,a}.tar", "named twice"),
        ("/no/such/*.tar", "no shard matches"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        expand(pattern)
    assert "\n" not in str(raised.value)


def test_globs_are_sorted_and_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "a.tar", "c[1].tar", "d/e.tar"):
        write_tar(tmp_path / name, [])
    assert expand(f"{tmp_path}/b-*.tar") == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]
    assert expand(f"{tmp_path}/[ab]*.tar") == [f"{tmp_path}/{name}" for name in ("a.tar", "b-0.tar", "b-1.tar")]
    assert expand(f"{tmp_path}/c[1].tar") == [f"{tmp_path}/c[1].tar"]
    assert expand(f"{tmp_path}/**/e.tar") == [f"{tmp_path}/d/e.tar"]
    assert expand(f"{tmp_path}/?.tar::{tmp_path}/d/*") == [f"{tmp_path}/a.tar", f"{tmp_path}/d/e.tar"]


def test_relative_paths_begin_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", [])
    assert expand("a.tar") == expand("./*.tar") == [f"{tmp_path}/a.tar"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard .*/a\.tar is missing"), open_shard(str(tmp_path / "a.tar")):
        pass
    with pytest.raises(DataError, match=r"a\.idx is missing"):
        read_small(str(tmp_path / "a.idx"), 10)
    (tmp_path / "a.idx").write_bytes(b"x" * 11)
    with pytest.raises(DataError, match="larger than 10 bytes"):
        read_small(str(tmp_path / "a.idx"), 10)
    assert read_small(str(tmp_path / "a.idx"), 11) == b"x" * 11


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"needs one more package.*pip install"), open_shard("abfs://b/x.tar"):
        pass

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from data_sets import contents, index, write_idx
from shard_files import jpg, labelled, write_tar

from distcnn.data.labels import LabelRule
from distcnn.errors import DataError


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

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcnn.data.prepare.keys import MAX_KEY_BYTES, make_keys
from distcnn.data.prepare.source import Source
from distcnn.data.shards import split_name


def source(names: list[str], named: bool = True) -> Source:
    zeros = np.zeros(len(names), dtype=np.int64)
    return Source(
        kind="test",
        name="test",
        classes=("a",),
        names=names,
        labels=zeros,
        payload=lambda i: b"",
        sizes=zeros,
        digest="",
        split_of=zeros,
        named=named,
    )


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a/1.jpg", "a/2.jpg"], ["a/1", "a/2"]),
        (["a/1.jpg", "a/1.png"], ["a/1", "a/1-0000000001"]),
        (["v1.2/x.y.jpg"], ["v1_2/x_y"]),
        (["a b/ü(1).jpg", "a b/ö(1).jpg"], ["a_b/__1_", "a_b/__1_-0000000001"]),
        (["abc", "v1.2/abc"], ["abc", "v1_2/abc"]),
        (["/lead.jpg", "trail/"], ["lead", "trail"]),
        ([".jpg", "..jpg"], ["-0000000000", "_"]),
        (["a-0000000002.jpg", "a.jpg", "a.png"], ["a-0000000002", "a", "a-0000000005"]),
        (["x" * 200 + ".jpg"], ["x" * 79 + "-0000000000"]),
        (["a-0000000001.jpg", "b/../a.jpg", "a.jpg", "a.png"], ["a-0000000001", "b/__/a", "a", "a-0000000003"]),
    ],
)
def test_keys_are_names_made_safe(names: list[str], keys: list[str]) -> None:
    assert make_keys(source(names)) == keys


def test_sources_without_names_have_numbers() -> None:
    assert make_keys(source(["00000000", "00000001"], named=False)) == ["00000000", "00000001"]


@given(
    st.lists(
        st.text(st.sampled_from("ab./ ü-0123456789"), max_size=12) | st.text(min_size=80, max_size=130), min_size=1
    )
)
def test_keys_are_unique_short_and_survive_a_tar(names: list[str]) -> None:
    keys = make_keys(source(names))
    assert len(set(keys)) == len(names)
    for key in keys:
        assert 0 < len(key.encode()) <= MAX_KEY_BYTES
        assert split_name(f"{key}.jpg") == (key, "jpg")
        assert not key.startswith("/")
        assert ".." not in key

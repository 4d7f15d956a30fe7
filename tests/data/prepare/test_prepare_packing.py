from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from prepare_files import by_webdataset, encode, jpg, picture, png, write

from distcnn.data.prepare.handover import Left, leave, memory_of, slots
from distcnn.data.prepare.images import Policy
from distcnn.data.prepare.keys import MAX_KEY_BYTES
from distcnn.data.prepare.packing import tar_of
from distcnn.data.prepare.source import Payload
from distcnn.data.prepare.work import Task, content_hash, hash_payloads, pack
from distcnn.data.prepare.writer import Limits, ShardWriter, join_rows
from distcnn.data.shards import make_index, samples_in
from distcnn.errors import UserError

SAMPLES = [
    ("a/b", {"jpg": b"x" * 1000, "cls": b"3", "json": b'{"name": "a/b.jpg"}'}),
    ("k" * MAX_KEY_BYTES, {"webp": b"", "cls": b"0"}),
    ("c", {"png": b"y" * 512}),
    ("d", {"png": bytes(range(256)) * 41, "cls": b"123456"}),
]

Members = dict[str, bytes]
KEYS = st.text(st.characters(codec="ascii", exclude_characters="\0./"), min_size=1, max_size=MAX_KEY_BYTES)
MEMBERS = st.dictionaries(st.sampled_from(["jpg", "png", "webp", "cls", "json", "jpeg"]), st.binary(max_size=1100))


def plain(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    """What webdataset.TarWriter writes, untouched."""
    out = io.BytesIO()
    with webdataset.TarWriter(out, user="", group="", mtime=0, encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return out.getvalue()


def tar(samples: list[tuple[str, Members]]) -> tuple[bytes, list[int]]:
    """The bytes of `tar_of`, and where each member's content begins."""
    members = [(f"{key}.{ext}", content) for key, held in samples for ext, content in sorted(held.items())]
    data, offsets = tar_of([name for name, _ in members], [content for _, content in members])
    for offset, (_, content) in zip(offsets, members, strict=True):
        assert data[offset : offset + len(content)].tobytes() == content
    return data.tobytes(), offsets.tolist()


def test_the_bytes_are_those_of_webdatasets_writer() -> None:
    data, offsets = tar(SAMPLES)
    expected = plain(SAMPLES)
    assert data == expected[: len(data)]
    assert not expected[len(data) :].strip(b"\0")
    assert offsets[0] == 512 and len(offsets) == sum(len(members) for _, members in SAMPLES)


@given(st.lists(st.tuples(KEYS, MEMBERS), max_size=5))
def test_the_bytes_are_those_of_webdatasets_writer_whatever_the_sample(samples: list[tuple[str, Members]]) -> None:
    data, _ = tar(samples)
    assert plain(samples)[: len(data)] == data


def test_packing_comes_without_torch() -> None:
    code = "import sys, distcnn.data.prepare.work; print('torch' in sys.modules, 'webdataset' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["False", "False"]


def test_a_member_that_no_header_can_name_is_an_error() -> None:
    for key in ("k" * 98, "\xfc"):
        with pytest.raises(ValueError, match=r"does not fit|codec can't encode"):
            tar_of([f"{key}.jpg"], [b""])


def test_a_part_is_handed_over_in_memory_or_as_it_is() -> None:
    data, more = (np.random.default_rng(seed).integers(0, 256, 5000, dtype=np.uint8) for seed in (0, 1))
    with slots(2) as names:
        one, two, again = next(names), next(names), next(names)
        assert one == again != two
        left = leave(data, one)
        assert isinstance(left, Left) and isinstance(leave(more, two), Left)
        buffer = bytearray()
        assert memory_of(left, buffer) == data.data
        shorter = leave(more[:7], again)  # the slot is used again, for less than it held
        assert memory_of(shorter, buffer) == more[:7].data
        assert memory_of(leave(data[:0], one), buffer) == b""
    assert leave(data, one) is data  # the slots are gone
    assert leave(data, "") is data and memory_of(data, buffer) == data.data
    with slots(0) as names:
        assert next(names) == next(names) == ""


def packed(payloads: list[Payload], labels: list[int] | None = None, name: str = "n") -> Task:
    n = len(payloads)
    return Task(
        [f"k{i}" for i in range(n)], [f"{name}{i}" if name else "" for i in range(n)], labels or [0] * n, payloads, ""
    )


def test_a_task_becomes_a_part_and_bad_images_are_named(tmp_path: Path) -> None:
    write(tmp_path / "good.jpg", jpg(1))
    payloads: list[Payload] = [png(0), b"", str(tmp_path / "good.jpg"), b"text", str(tmp_path / "gone.jpg"), jpg(2)]
    task = packed(payloads, labels=[5, 1, 2, 3, 4, -1])
    part = pack(task, Policy(), count_pixels=True, hash_images=True)
    assert part.good == [0, 2, 5]
    assert part.bad == [1, 3, 4]
    assert [reason.split(":")[0] for reason in part.reasons] == ["0 bytes", part.reasons[1], "cannot be read"]
    assert part.rows["key"].tolist() == [b"k0", b"k2", b"k5"]
    assert part.rows["label"].tolist() == [5, 2, -1]
    assert part.rows["width"].tolist() == [12] * 3
    assert part.rows["height"].tolist() == [8] * 3
    assert part.sums.pixels == 3 * 12 * 8
    for row, image in zip(part.rows, (png(0), jpg(1), jpg(2)), strict=True):
        assert part.tar[row["offset"] :][: row["size"]].tobytes() == image
    assert part.hashes == b"".join(map(content_hash, (png(0), jpg(1), jpg(2))))
    assert part.ends[-1] == len(part.tar)


def test_members_are_the_image_the_label_and_the_name(tmp_path: Path) -> None:
    names = ['q"uo\\te/ü\n.png', "", "z"]
    task = Task(["a", "b", "c"], names, [7, 0, -1], [png(0), jpg(1), encode(picture(), "WEBP")], "")
    part = pack(task, Policy(), count_pixels=False)
    write(tmp_path / "x.tar", part.tar.tobytes() + bytes(1024))
    samples = by_webdataset([tmp_path / "x.tar"])
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames()[:3] == ["a.cls", "a.json", "a.png"]
    plain_members = [{k: v for k, v in s.items() if not k.startswith("__")} for s in samples]
    assert [s["__key__"] for s in samples] == ["a", "b", "c"]
    assert plain_members[1] == {"jpg": jpg(1), "cls": b"0"}
    assert plain_members[2].keys() == {"webp", "json"}
    assert json.loads(plain_members[0]["json"]) == {"name": names[0]}
    assert plain_members[0]["cls"] == b"7"


def test_a_decoder_that_fails_in_its_own_way_makes_a_bad_image() -> None:
    broken = np.zeros((8, 12, 7), dtype=np.uint8)  # Pillow raises TypeError
    part = pack(packed([broken, jpg()]), Policy(), count_pixels=False)
    assert part.bad == [0]
    assert "the decoder failed: TypeError" in part.reasons[0]


def test_hashes_are_of_the_content(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", jpg(1))
    pixels = np.zeros((2, 2), dtype=np.uint8)
    hashes = hash_payloads(["a.jpg", "gone", jpg(1), pixels, pixels.copy()], str(tmp_path))
    assert hashes[0] == hashes[2] != hashes[3] == hashes[4]
    assert hashes[1] == b""


@pytest.mark.parametrize(
    "limits", [Limits(1, 1 << 30), Limits(3, 1 << 30), Limits(1000, 4000), Limits(7, 9000), Limits()]
)
@pytest.mark.parametrize("cuts", [[0, 10], [0, 1, 2, 9, 10], [0, 5, 5, 10]])
def test_shards_do_not_depend_on_how_the_samples_come(tmp_path: Path, limits: Limits, cuts: list[int]) -> None:
    payloads = [jpg(i, width=10 + 9 * i) for i in range(10)]
    whole = Task([f"k{i:0{1 + i}d}" for i in range(10)], ["n"] * 10, list(range(10)), list(payloads), "")
    expected: list[list[int]] = [[]]
    size = 0
    for i, data in enumerate(payloads):
        if len(expected[-1]) >= limits.samples or size >= limits.bytes:
            expected.append([])
            size = 0
        expected[-1].append(i)
        size += sum(512 + -(-n // 512) * 512 for n in (len(data), 1, 13))
    with ShardWriter(tmp_path, "train", limits) as writer:
        for start, stop in itertools.pairwise(cuts):
            part = Task(*(getattr(whole, f)[start:stop] for f in ("keys", "names", "labels", "payloads")), "")
            writer.add(pack(part, Policy(), count_pixels=False))
        shards = writer.finish()
    assert [shard.samples for shard in shards] == [len(ids) for ids in expected]
    for shard, ids in zip(shards, expected, strict=True):
        members = [(whole.keys[i], {"jpg": payloads[i], "cls": b"%d" % i, "json": b'{"name": "n"}'}) for i in ids]
        data = (tmp_path / shard.name).read_bytes()
        assert data == plain(members)  # padding too
        assert len(data) == shard.bytes
        index = np.load(tmp_path / shard.index)
        assert [data[row["offset"] :][: row["size"]] for row in index] == [payloads[i] for i in ids]
        found = list(samples_in(tmp_path / shard.name))
        assert [(s.key.encode(), s.image.offset) for s in found if s.image] == index[["key", "offset"]].tolist()


def test_index_rows_join_with_the_widest_key() -> None:
    rows = join_rows([make_index([(1, 2, 3, 4, 5, "a")]), make_index([(6, 7, 8, 9, 10, "long key")])])
    assert rows.tolist() == [(1, 2, 3, 4, 5, b"a"), (6, 7, 8, 9, 10, b"long key")]


@pytest.mark.parametrize("limits", [(0, 1), (1, 0), (-1, 5)])
def test_limits_that_hold_nothing_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="--shard-samples"):
        Limits(*limits)


def test_the_tar_is_one_for_tarfile_too(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val", Limits()) as writer:
        writer.add(pack(packed([jpg(0), jpg(1)]), Policy(), count_pixels=False))
        (shard,) = writer.finish()
    with tarfile.open(tmp_path / shard.name) as tar:
        infos = tar.getmembers()
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o444)}

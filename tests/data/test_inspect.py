from __future__ import annotations

import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from shard_files import encode, hostile_pickle, jpg, picture, write_tar

from distcnn.cli import main
from distcnn.data.index import IndexRequest, index_data_set
from distcnn.data.inspect.advice import Advice, advise, training_side
from distcnn.data.inspect.facts import Facts, inspect_data_set
from distcnn.data.inspect.near import alike, groups, near_pairs, perceptual_hash, same_details
from distcnn.data.inspect.page import page
from distcnn.data.inspect.pictures import Album, samples_of_classes
from distcnn.data.inspect.plots import drawable, plots
from distcnn.data.inspect.scan import kind_of
from distcnn.data.inspect.tables import print_tables
from distcnn.data.inspect.text import counted, shown, size
from distcnn.data.labels import parse_rule
from distcnn.data.manifest import load_manifest

Members = list[tuple[str, bytes]]


def make_set(root: Path, splits: dict[str, Members | list[Members]], label: str = "folder", **options: Any) -> Path:
    """A data set whose labels are folder names: one shard a split, or several."""
    shards: dict[str, list[str]] = {}
    for split, members in splits.items():
        parts = members if members and isinstance(members[0], list) else [members]
        shards[split] = [
            str(write_tar(root / f"{split}-{number}.tar", part, tarfile.PAX_FORMAT))  # type: ignore[arg-type]
            for number, part in enumerate(parts)
        ]
    index_data_set(IndexRequest(root, shards, rule=parse_rule(label), workers=1, **options))
    return root


def look(root: Path) -> Facts:
    return inspect_data_set(root, load_manifest(root), workers=1)


def texts(facts: Facts, level: str = "") -> str:
    return "\n".join(item.text for item in advise(facts) if not level or item.level == level)


def rendered(root: Path, facts: Facts) -> str:
    return page(facts, advise(facts), plots(facts), Album(root, load_manifest(root), facts))


def printed(facts: Facts, advice: list[Advice] | None = None) -> str:
    out = io.StringIO()
    print_tables(facts, advise(facts) if advice is None else advice, Console(file=out, width=200, color_system=None))
    return out.getvalue()


# ---- look-alikes ----


@given(st.integers(0, 8), st.integers(0, 10_000), st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_near_pairs_are_all_pairs_within_the_radius(radius: int, seed: int, clusters: int) -> None:
    """Against a comparison of each with each, on hashes in clusters of up to 10 changed bits."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, clusters, dtype=np.uint64)
    bits = np.uint64(1) << rng.integers(0, 64, (300, 10), dtype=np.uint64)
    kept = np.where(rng.integers(0, 11, (300, 1)) > np.arange(10), bits, np.uint64(0))
    hashes = np.unique(rng.choice(centres, 300) ^ np.bitwise_xor.reduce(kept, axis=1))
    rng.shuffle(hashes)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = np.argwhere(np.triu(distance <= radius, 1))
    found, used = near_pairs(hashes, radius)
    assert used == radius
    assert found.tolist() == expected.tolist()


def test_equal_hashes_are_chained_and_few_or_none_are_no_trouble() -> None:
    assert near_pairs(np.zeros(4, np.uint64))[0].tolist() == [[0, 1], [1, 2], [2, 3]]
    for count in (0, 1):
        assert near_pairs(np.zeros(count, np.uint64))[0].shape == (0, 2)


def test_when_everything_looks_alike_the_radius_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.inspect.near.MAX_PAIRS", 2000)
    hashes = np.arange(300, dtype=np.uint64)
    found, radius = near_pairs(hashes)
    assert radius == 2 or radius == 1
    assert 0 < len(found) <= 300 * 300
    assert (np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]]) <= radius).all()


def canvas(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX))


def same_picture(image: np.ndarray) -> list[np.ndarray]:
    """The picture as it comes back from other hands: JPEG, half the size, brighter, less contrast."""
    half = Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2), Image.Resampling.LANCZOS)
    jpeg = np.asarray(Image.open(io.BytesIO(encode(image, "JPEG", quality=60))))
    return [jpeg, np.asarray(half), (image * 0.8 + 40).astype(np.uint8), np.clip(image + 25.0, 0, 255).astype(np.uint8)]


def noisy_picture(seed: int, side: int = 64) -> np.ndarray:
    """Random blobs with details, as photographs have them."""
    rng = np.random.default_rng(seed)
    out = np.zeros((side, side, 3))
    for cells in (4, 8, 16):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        out += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) / 3
    return out.astype(np.uint8)


def luma(images: list[np.ndarray]) -> np.ndarray:
    return (np.stack([canvas(image) for image in images]) @ np.array([0.299, 0.587, 0.114])).astype(np.float32)


def test_the_same_picture_is_found_and_others_are_not() -> None:
    pictures = [noisy_picture(seed) for seed in range(30)]
    images = [image for one in pictures for image in [one, *same_picture(one)]]
    canvases = luma(images)
    thumbs = np.rint(canvases.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4))).astype(np.uint8)
    pairs, score = alike(thumbs, near_pairs(perceptual_hash(canvases))[0])
    assert ((pairs[:, 0] // 5) == (pairs[:, 1] // 5)).all()
    assert [len(group) for group in groups(pairs)] == [5] * 30
    assert (np.diff(score) <= 0).all()


def test_what_is_alike_depends_on_how_alike_a_class_is_anyway() -> None:
    """Photographs: 0.8. One shape with some noise, as with handwritten digits: nearly equal."""
    photographs = np.random.default_rng(0).integers(0, 256, (200, 16, 16))
    labels = np.arange(200, dtype=np.int32) % 3
    assert same_details(photographs.astype(np.uint8), labels) == 0.8
    digits = photographs[:3][labels] * 0.8 + photographs * 0.2
    assert same_details(digits.astype(np.uint8), labels) > 0.95
    for few in (0, 1, 2, 99):
        assert same_details(digits[:few].astype(np.uint8), labels[:few]) == 0.8


def test_blank_images_are_not_called_alike() -> None:
    """A white and a black page have no details to compare."""
    thumbs = np.stack([np.full((16, 16), 250), np.full((16, 16), 3), np.full((16, 16), 250)]).astype(np.uint8)
    thumbs[[0, 2], ::4, ::4] += 1  # as JPEG leaves traces on a blank page
    assert len(alike(thumbs, np.array([[0, 1], [0, 2]]))[0]) == 0


def test_a_copy_is_not_counted_as_a_look_alike_too(tmp_path: Path) -> None:
    """An image of val that is in train byte for byte, and once more as a JPEG."""
    image = noisy_picture(5)
    train = [("a/1.png", encode(image)), ("a/2.jpg", encode(image, "JPEG", quality=90)), *many("b", 3)]
    like = look(make_set(tmp_path, {"train": train, "val": [("a/1.png", encode(image))]})).likeness
    assert [(leak.exact, leak.near) for leak in like.leaks] == [(1, 0)]
    assert (like.copies, like.near) == (1, 2)
    assert [len(group) for group in like.groups] == [3]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([], []), ([[3, 4]], [[3, 4]]), ([[0, 1], [5, 6], [1, 9], [6, 5], [7, 0]], [[0, 1, 7, 9], [5, 6]])],
)
def test_groups(pairs: list[list[int]], expected: list[list[int]]) -> None:
    assert [group.tolist() for group in groups(np.array(pairs, dtype=np.int64).reshape(-1, 2))] == expected


# ---- facts ----


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Facts]:
    """Two splits with copies, look-alikes, a wrong label, several formats and sizes."""
    images = [noisy_picture(seed, 40 + 8 * (seed % 3)) for seed in range(24)]
    train = [(f"cat/{n:02d}.png", encode(image)) for n, image in enumerate(images[:12])]
    train += [(f"dog/{n:02d}.jpg", encode(image, "JPEG", quality=95)) for n, image in enumerate(images[12:16], 12)]
    train += [("dog/copy.png", encode(images[0])), ("dog/gray.png", encode(np.full((40, 40), 255, np.uint8)))]
    val = [(f"dog/{n:02d}.webp", encode(image, "WEBP", quality=95)) for n, image in enumerate(images[16:20], 16)]
    val += [("cat/leak.png", encode(images[1])), ("cat/near.jpg", encode(images[2], "JPEG", quality=80))]
    val += [("cat/black.png", encode(np.zeros((9, 90, 3), np.uint8)))]
    root = make_set(tmp_path_factory.mktemp("set"), {"train": train, "val": val})
    return root, look(root)


def test_counts_sizes_and_formats(example: tuple[Path, Facts]) -> None:
    root, facts = example
    train, val = facts.splits
    assert (facts.images, train.images, val.images) == (25, 18, 7)
    assert (train.class_counts.tolist(), val.class_counts.tolist()) == ([12, 6], [3, 4])
    assert train.imbalance == 2
    assert train.formats == {("PNG", "RGB"): 13, ("JPEG", "RGB"): 4, ("PNG", "gray"): 1}
    assert val.formats[("WEBP", "RGB")] == 4
    assert facts.uniform is None
    with tarfile.open(root / "train-0.tar") as tar:
        assert train.bytes == train.class_bytes.sum() == sum(member.size for member in tar.getmembers())
    assert facts.columns.gray.sum() == 2
    assert facts.extremes["Brightest"][0] == facts.columns.brightness.argmax()
    assert facts.columns.brightness[facts.extremes["Darkest"][0]] == 0
    assert facts.columns.height[facts.extremes["Smallest"][0]] == 9


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    images = [picture(seed, 32, 32) for seed in range(9)]
    facts = look(make_set(tmp_path, {"train": [(f"a/{n}.png", encode(image)) for n, image in enumerate(images)]}))
    pixels = np.stack(images) / 255
    assert np.allclose(facts.splits[0].mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    assert np.allclose(facts.splits[0].std, pixels.std(axis=(0, 1, 2)), atol=1e-6)
    assert np.abs(facts.mean_image - 255 * pixels.mean(axis=0)).max() <= 0.51
    assert facts.uniform == (32, 32)
    assert facts.splits[0].brightness == pytest.approx((pixels @ [0.299, 0.587, 0.114]).mean(), abs=1e-5)


def test_samples_are_of_their_class_and_split(example: tuple[Path, Facts]) -> None:
    facts = example[1]
    for split, sizes in (("train", [8, 6]), ("val", [3, 4])):
        samples = samples_of_classes(facts, split)
        assert [len(places) for _, places in samples] == sizes
        for label, places in samples:
            assert (facts.columns.label[places] == label).all()
            assert facts.of_split(split)[places].all()


def test_copies_leaks_and_wrong_labels(example: tuple[Path, Facts]) -> None:
    like = example[1].likeness
    assert like.copies == 2
    assert like.near == 1
    assert (like.conflicts, like.conflicts_exact) == (1, 1)
    assert [(leak.split, leak.other, leak.exact, leak.near) for leak in like.leaks] == [("val", "train", 1, 1)]
    assert [len(group) for group in like.groups] == [2, 2, 2]
    advice = texts(example[1], "warning")
    assert "val shares 2 images with train (29 % of val): 1 of the same bytes, 1 that look alike" in advice
    assert "1 pair of the same bytes have different labels" in advice


def test_processes_see_what_one_process_sees(example: tuple[Path, Facts], monkeypatch: pytest.MonkeyPatch) -> None:
    root, facts = example
    monkeypatch.setattr("distcnn.data.inspect.scan.BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr("distcnn.data.sweep.CHUNK_IMAGES", 5)
    again = inspect_data_set(root, load_manifest(root), workers=2)
    for name in facts.columns.__dataclass_fields__:
        assert (getattr(again.columns, name) == getattr(facts.columns, name)).all(), name
    assert [split.mean for split in again.splits] == [split.mean for split in facts.splits]
    assert again.likeness.pairs.tolist() == facts.likeness.pairs.tolist()


def test_images_that_do_not_decode_are_named_not_fatal(tmp_path: Path) -> None:
    members = [("a/1.png", encode(picture(1))), ("a/2.jpg", b"text"), ("b/3.png", encode(picture(3))), ("b/4.png", b"")]
    root = make_set(tmp_path, {"train": members})
    facts = look(root)
    assert facts.images == 2
    assert facts.undecodable == (("train", "train-0.tar/a/2", "not an image in JPEG, PNG, WEBP, GIF, BMP, TIFF"),)
    assert "1 image of the set cannot be decoded" in texts(facts, "warning")
    assert "train-0.tar/b/4.png" in printed(facts)
    html = rendered(root, facts)
    assert "train-0.tar/a/2" in html
    assert "0 bytes" in html


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (jpg(), ("JPEG", "RGB")),
        (encode(Image.new("L", (3, 3)), "JPEG"), ("JPEG", "gray")),
        (encode(Image.new("CMYK", (3, 3)), "JPEG"), ("JPEG", "CMYK")),
        (encode(Image.new("P", (3, 3))), ("PNG", "palette")),
        (encode(Image.new("RGBA", (3, 3))), ("PNG", "RGBA")),
        (encode(Image.new("LA", (3, 3))), ("PNG", "gray + alpha")),
        (encode(np.zeros((3, 3), np.uint16)), ("PNG", "gray 16 bit")),
        (encode(Image.new("RGBA", (3, 3), (1, 2, 3, 4)), "WEBP"), ("WEBP", "RGBA")),
        (encode(Image.new("P", (3, 3)), "GIF"), ("GIF", "palette")),
        (encode(Image.new("1", (3, 3)), "BMP"), ("BMP", "1 bit")),
    ],
)
def test_kinds(data: bytes, expected: tuple[str, str]) -> None:
    assert kind_of(data) == expected


# ---- advice ----


def many(label: str, count: int, start: int = 0, side: int = 8) -> Members:
    return [(f"{label}/{n}.png", encode(picture(start + n, side, side))) for n in range(count)]


@pytest.mark.parametrize(
    ("splits", "level", "message"),
    [
        ({"train": many("a", 40) + many("b", 3, 50)}, "warning", "Imbalance 13.3: 'a' has 40 images, 'b' 3"),
        ({"train": many("a", 40) + many("b", 20, 50)}, "notice", "Imbalance 2.0"),
        ({"train": many("a", 20) + many("b", 20, 50)}, "good", "balanced"),
        ({"train": many("a", 20) + many("b", 19, 50)}, "notice", "Fewer than 20 training images of 'b'"),
        ({"train": many("a", 3)}, "warning", "one class only"),
        ({"train": many("a", 3), "val": many("b", 2, 9)}, "warning", "No image in train of 'b'"),
        ({"train": many("a", 3), "val": many("b", 2, 9)}, "warning", "val has classes that train lacks"),
        ({"train": many("a", 3), "val": many("a", 2, 9)}, "good", "No image is in two splits"),
        ({"train": many("a", 3)}, "notice", "neither a val nor a test split"),
        ({"train": many("a", 3), "test": many("a", 1, 9)}, "good", "All images are 8 x 8: train at --image-size 8"),
        ({"train": [many("a", 1), many("a", 2, 2)]}, "notice", "2 shards in train"),
        ({"train": [many("a", 1, n) for n in range(8)]}, "good", "8 shards in train keep 8 ranks"),
        ({"train": [many("a", 1), many("a", 1, 9), many("a", 12, 20)]}, "notice", "Shards hold 1 to 12 samples"),
        (
            {"train": many("a", 3), "val": [("a/1.png", encode(np.full((8, 8, 3), 255, np.uint8)))]},
            "notice",
            "mean colours of val and train",
        ),
        ({"train": [("a/1.png", encode(np.zeros((8, 8), np.uint8)))]}, "notice", "All images are gray"),
    ],
)
def test_advice(tmp_path: Path, splits: dict[str, Any], level: str, message: str) -> None:
    assert message in texts(look(make_set(tmp_path, splits)), level)


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(28, 28)], 28),
        ([(128, 128)], 128),
        ([(640, 480)], 224),
        ([(500, 375), (375, 500), (90, 80)], 224),
        ([(100, 100), (110, 140)], 96),
        ([(9, 9), (10, 12)], 32),
    ],
)
def test_side_to_train_at(tmp_path: Path, sizes: list[tuple[int, int]], side: int) -> None:
    members = [(f"a/{n}.png", encode(Image.new("L", sizes[n]))) for n in range(len(sizes))]
    assert training_side(look(make_set(tmp_path, {"train": members}))) == side


# ---- unusual sets ----


@pytest.mark.parametrize(
    ("splits", "label"),
    [
        ({"train": many("a", 1)}, "folder"),
        ({"train": many("a", 1)}, "none"),
        ({"predict": many("a", 2)}, "none"),
        ({"train": [many("a", 1), many("b", 30, 1)], "test": many("b", 1, 40)}, "folder"),
        ({"train": [item for n in range(70) for item in many(f"c{n:03d}", 1, n)]}, "folder"),
        ({f"s{n}": many("a", 1, n) + many("b", 1, n + 20) for n in range(7)}, "folder"),
    ],
)
def test_unusual_sets_are_shown(tmp_path: Path, splits: dict[str, Any], label: str) -> None:
    root = make_set(tmp_path, splits, label)
    facts = look(root)
    assert printed(facts)
    assert "</html>" in rendered(root, facts)


def test_a_remote_set(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", many("a", 3) + many("b", 3, 9))
    with fsspec.open("memory://inspect/a.tar", "wb") as file:
        file.write(path.read_bytes())
    root = tmp_path / "set"
    index_data_set(IndexRequest(root, {"train": ["memory://inspect/a.tar"]}, rule=parse_rule("folder"), workers=1))
    facts = look(root)
    assert facts.images == 6
    assert "memory://inspect/a.tar/b/0" in rendered(root, facts)


# ---- names of strangers ----

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>",
    "[bold red]x[/bold red]",
    "[/]",
    "$\\frac{$",
    "$x",
    "&lt;",
    "\x1b[31mred\x1b[0m",
    "line\nbreak",
    "\u202egnp.exe",
    "日本語",
    "😀",
    "_under",
    "%s{0}",
]


class _Tags(HTMLParser):
    """What a browser would see: the tags, their attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    train: Members = []
    for number, name in enumerate(HOSTILE):
        for copy in range(2):
            key = f"{number}{name.replace('.', '')}{copy}"
            train += [(f"{key}.png", encode(picture(10 * number + copy)))]
            train += [(f"{key}.json", json.dumps({"label": name}).encode())]
    train += [("<b>bad.png", b"x"), ("<b>bad.json", b'{"label": "_under"}'), ("<i>empty.png", b"")]
    root = make_set(tmp_path / "set", {"train": train, "$\\frac{$": train[:2]}, "label", name="[/]<b>set")
    facts = look(root)
    assert set(facts.classes) == set(HOSTILE)
    html = rendered(root, facts)
    seen = _Tags()
    seen.feed(html)
    allowed = "html head meta title style body header h1 h2 main section footer div b ul li ol p figure figcaption"
    allowed += " img picture source details summary table thead tbody tr th td br"
    assert set(seen.tags) <= set(allowed.split())
    for tag, name, value in seen.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/"), (tag, name)
    for name in HOSTILE:
        assert shown(name) in seen.words, name
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", html.replace("\n", ""))
    out = printed(facts)
    assert "\x1b" not in out
    assert "[/]<b>set" in out
    assert "$\\frac{$" in out
    for name in HOSTILE:
        assert shown(name) in out, name


def test_the_page_needs_nothing_else(example: tuple[Path, Facts]) -> None:
    html = rendered(*example)
    assert re.findall(r"(?:https?:)?//[^\"'\s)]+", re.sub(r"data:[^\"]+", "", html)) == []
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert html.count("<picture>") == html.count("<source ") > 2


def test_pickles_beside_the_images_are_not_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = hostile_pickle(trace)
    members = [("a/1.png", encode(picture(0))), ("a/1.pth", payload), ("a/1.pkl", payload), ("a/2.jpg", payload)]
    root = make_set(tmp_path / "set", {"train": members})
    facts = look(root)
    rendered(root, facts)
    assert len(facts.undecodable) == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cat"),
        ("a" * 40, "a" * 21 + "…"),
        ("日本", "#3"),
        ("é", "é"),
        ("a\tb", "#3"),
        ("", "#3"),
        ("$x$", "$x$"),
    ],
)
def test_names_on_axes(name: str, expected: str) -> None:
    assert drawable(name, 3) == expected


def test_numbers_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345, 999_999, 5.5e9, 3e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 kB",
        "1 MB",
        "5.5 GB",
        "3,000.0 TB",
    ]
    assert (counted(1, "pair"), counted(1030, "pair"), counted(0, "is", "are")) == ("1 pair", "1,030 pairs", "0 are")


# ---- the command ----


def test_the_command(example: tuple[Path, Facts], capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = example
    assert main(["inspect", str(root), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "val shares 2 images with train" in out
    assert "</html>" in (root / "inspect.html").read_text()
    other = root / "other.html"
    assert main(["inspect", str(root / "dataset.json"), "--output", str(other), "--workers", "1"]) == 0
    assert other.read_text() == (root / "inspect.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/no"], "no dataset.json in"),
        (["{root}", "--output", "{root}"], "is a folder"),
        (["{root}", "--output", "{root}/no/x.html"], "cannot write"),
    ],
)
def test_the_command_refuses_in_one_line(
    example: tuple[Path, Facts], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["inspect", *(word.format(root=example[0]) for word in words), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_shard_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_set(tmp_path, {"train": many("a", 2)})
    (root / "train-0.tar").unlink()
    assert main(["inspect", str(root), "--workers", "1"]) == 2
    assert "train-0.tar is missing" in capsys.readouterr().err

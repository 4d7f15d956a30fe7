from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from data_sets import Members, example_set, look, make_set, printed, rendered
from shard_files import encode, hostile_pickle, picture

from distcnn.data.inspect.facts import Facts
from distcnn.plotting import drawable
from distcnn.text import counted, shown, size


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Facts]:
    return example_set(tmp_path_factory.mktemp("set"))


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
        ("\u202eb", "#3"),
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

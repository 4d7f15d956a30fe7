from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from distcnn.charts import class_bars
from distcnn.cli import main
from distcnn.config import ModelConfig
from distcnn.data.order import EpochOrder
from distcnn.data.shards import SplitReader
from distcnn.errors import UserError
from distcnn.outcome import FOLDER, LAST, Outcome
from distcnn.pictures import tile
from distcnn.plotting import LIGHT
from distcnn.report.curves import MAX_POINTS, MAX_RANKS, samples_text, speed, thinned
from distcnn.report.gather import RunFacts, differences, gather
from distcnn.report.network import network, stages_of
from distcnn.report.page import page
from distcnn.report.samples import SIDE, case_pictures, training_batch
from distcnn.report.summary import advice, summary
from distcnn.sessions import SESSIONS, start_row
from distcnn.shapes import layer_shapes, meta_model
from distcnn.text import shown
from distcnn.times import LOADING, PARTS, RankTimes
from tests.harness import simulate, small_config
from tests.support import stripes

HOSTILE = ["<script>alert(1)<", "<img src=x onerror=alert(1)>", "\"'><b>", "$\\frac{$", "&lt;日本"]


@pytest.fixture(scope="module")
def hostile_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images whose names are no good names; so are those of the images."""
    root = tmp_path_factory.mktemp("hostile")
    noise = np.random.default_rng(3)
    for label, name in enumerate(HOSTILE):
        (root / "images" / name).mkdir(parents=True)
        for number in range(12):
            file = root / "images" / name / f"<i>{number}.png"
            Image.fromarray(stripes(label, 8, noise)).save(file)
    assert main(["prepare", "folder", str(root / "images"), "--output", str(root / "set")]) == 0
    return root / "set"


@pytest.fixture(scope="module")
def runs(hostile_set: Path, stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: `hostile`, mixed, and `plain`, without anything random about its images."""
    root = tmp_path_factory.mktemp("runs")
    simulate(small_config(hostile_set, root / "hostile", lr=0.01), 2)
    plain = {"crop": "none", "flip": "none", "mixup": 0.0, "cutmix": 0.0}
    simulate(small_config(stripes_set, root / "plain", **plain), 1)
    return root


def facts(folder: Path, **values: Any) -> RunFacts:
    (found,) = gather([folder], **values)
    return found


class _Seen(HTMLParser):
    """What a browser would see: the tags, their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


TAGS = "html head meta title style body header h1 h2 h3 main section footer div b ul li p figure figcaption br"
TAGS += " img picture source details summary table thead tbody tr th td"


def test_names_are_text_and_the_page_needs_nothing_else(runs: Path) -> None:
    run = facts(runs / "hostile")
    assert run.last is not None
    cases = tuple(dataclasses.replace(case, shard="<i>s.tar", key="<b>\udcff") for case in run.last.unsure)
    text = page([dataclasses.replace(run, last=dataclasses.replace(run.last, unsure=cases))])
    seen = _Seen(text)
    assert seen.tags <= set(TAGS.split())
    for name, value in seen.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/")
    for name in HOSTILE:
        assert shown(name) in seen.words, name
    assert "<i>s.tar" in seen.words and "<b>\\udcff" in seen.words
    assert re.findall(r"(?:https?:)?//[^\"'\s)]+", re.sub(r"data:[^\"]+", "", text)) == []
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert text.count("<picture>") == text.count("<source ") == 12, "4 curves, 4 of speed, 3 of evaluation, 1 network"


def test_several_runs_share_their_axes_and_differ_in_their_settings(runs: Path) -> None:
    both = gather([runs / "hostile", runs / "plain"])
    rows = dict(differences(both))
    assert set(rows) == {"data", "lr", "crop", "flip", "mixup", "cutmix"} and rows["lr"] == ["0.01", "0.003"]
    text = page(both)
    assert text.count("<picture>") == 4 + 1 + 2 * (3 + 1)
    words = _Seen(text).words
    assert "Settings that differ" in words and "Evaluation - plain" in words and words.count("0.01") >= 1


def test_runs_of_the_same_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    assert len({run.name for run in gather([runs / "plain", tmp_path / "plain"])}) == 2
    with pytest.raises(UserError, match="named twice"):
        gather([runs / "plain", runs / "plain" / ".." / "plain"])


def test_what_is_said_of_a_finished_run(runs: Path) -> None:
    run = facts(runs / "plain")
    results = json.loads((runs / "plain" / "results.json").read_text())
    said = summary(run)
    assert said["state"] == "complete" and said["samples seen"] == "134" and said["resumed"] == "never"
    assert said["top-1"].startswith(f"{100 * results['val/top1']:.2f} %") and "of 37 images" in said["top-1"]
    assert said["best top-1"].endswith(f"after epoch {int(results['best/epoch']) + 1}")
    assert "67 images in train, 37 images in val" in said["data set"] and said["network"].startswith("cnn, ")
    assert run.speed() == results["images_per_second"] and "top-5" not in said, "of five classes it says nothing"


def test_the_network_is_drawn_stage_by_stage(runs: Path) -> None:
    resnet = meta_model(ModelConfig(model="resnet18"), 5, 64)
    stages = stages_of(layer_shapes(resnet, 8, 64), 64)
    assert [(stage.channels, stage.side, stage.layers) for stage in stages] == [
        (3, 64, 0),
        (64, 32, 1),
        (64, 16, 5),
        (128, 8, 5),
        (256, 4, 5),
        (512, 2, 5),
        (5, 1, 2),
    ]
    run = facts(runs / "plain")
    drawn = network(run)
    assert drawn is not None and drawn[0].alt.startswith("sizes of maps: 3 x 8 x 8 to ")
    parameters = run.machine["parameters"]
    assert f"{parameters:,} parameters" in drawn[1] and drawn[1] in page([run])
    assert network(dataclasses.replace(run, dataset=None)) is None, "its input is not known"


def test_the_pictures_are_those_of_the_samples_named(runs: Path, hostile_set: Path) -> None:
    run = facts(runs / "hostile")
    assert run.last is not None and len(run.last.unsure) > 5
    pictures = case_pictures(run)
    for case in run.last.unsure:
        with tarfile.open(hostile_set / case.shard) as tar:
            member = next(m for m in tar if m.name.startswith(f"{case.key}.") and m.name.endswith("png"))
            stored = tar.extractfile(member)
            assert stored is not None
            image = Image.open(io.BytesIO(stored.read())).convert("RGB")
        assert np.array_equal(np.asarray(pictures[case.id]), np.asarray(tile(image, SIDE)))


def test_the_training_batch_is_the_first_step(runs: Path, stripes_set: Path) -> None:
    """Without augmentation: the images as they are stored, in the order of the lanes."""
    run = facts(runs / "plain")
    assert run.dataset is not None
    reader = SplitReader(stripes_set, run.dataset.manifest.split("train"))
    order = EpochOrder(reader.counts, run.config.geometry, run.config.run.seed, 0, run.config.data.window_shards)
    ids = np.concatenate([order.tile(0, lane) for lane in range(6)])
    found = training_batch(run)
    assert len(found) == len(ids) == 24 and [picture.label for picture in found] == reader.labels(ids).tolist()
    for picture, data in zip(found, reader.read(ids), strict=True):
        stored = tile(Image.open(io.BytesIO(data)).convert("RGB"), SIDE)
        assert np.array_equal(np.asarray(picture.image), np.asarray(stored))
    mixed = training_batch(facts(runs / "hostile"))
    assert any(picture.label != picture.partner and picture.share < 1 for picture in mixed)


def test_a_data_set_that_is_gone_leaves_names(runs: Path, tmp_path: Path, stripes_set: Path) -> None:
    run = facts(runs / "plain", data=tmp_path / "nowhere")
    assert run.dataset is None and case_pictures(run) == {} and training_batch(run) == []
    words = _Seen(page([run])).words
    assert "Pictures are left out: the data set is not at" in words and "val-000000.tar, " in words
    other = facts(runs / "hostile", data=stripes_set)
    assert other.dataset is None and "is not the data set that was trained on" in other.missing


def test_a_run_that_has_only_begun(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "begun"
    (run / "logs").mkdir(parents=True)
    shutil.copy(runs / "plain" / "config.toml", run)
    found = facts(run)
    assert ("notice", "nothing is measured yet") in advice(found) and found.speed() is None and found.shares() == {}
    words = _Seen(page([found])).words
    assert "dead: no sign of life; the same command goes on" in words and "No evaluation is kept" in words


DAMAGE = {
    "metrics.jsonl": b'{"step": 1, "epoch": 0, "samples_seen": 5, "val/top1": null}\n[]\n{"step": 2}\n\xff\0',
    f"{FOLDER}/{LAST}": b'{"version": 1, "counts": [[0, 99, 1]]}',
    SESSIONS: b'{"kind": "start"}\n{"kind": "end"}\nnot JSON',
    "results.json": b"[" * 99,
    "checkpoints/latest/state.json": b"{",
}


def test_damaged_files_are_said_or_left_out(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(runs / "plain", run)
    for name, data in DAMAGE.items():
        (run / name).write_bytes(data)
    found = facts(run)
    assert [row["step"] for row in found.rows] == [1] and found.sessions == [] and found.last is None
    assert any(level == "warning" and "last.json cannot be read" in words for level, words in advice(found))
    assert "last.json cannot be read" in _Seen(page([found])).words


def test_resumptions_and_what_they_cost(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    rows = [start_row(0, 0, 1, {"git": {"commit": "a" * 40, "changed": True}}), {"kind": "end", "step": 9}]
    rows += [start_row(5, 0, 2, {}), {"kind": "end", "step": 6}, start_row(6, 1, 4, {})]
    for second, row in enumerate(rows):
        row["time"] = 1000 + 10 * second
    (run / SESSIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = facts(run)
    assert found.lost_steps == [4, 0]
    said = summary(found)
    assert said["resumed"] == "2 times" and said["steps made twice"] == "4" and said["wall time"] == "20.0 s"


def test_time_shares_are_means_over_time(runs: Path, tmp_path: Path) -> None:
    """100 samples in 1 s, then 100 in 3 s."""
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    rows = [
        {"step": 1, "epoch": 0, "samples_seen": 100, "perf/images_per_second": 100.0, "perf/wait_share": 0.5},
        {"step": 2, "epoch": 0, "samples_seen": 200, "perf/images_per_second": 100 / 3, "perf/wait_share": 0.1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "results.json").unlink()
    found = facts(run)
    assert found.speed() == pytest.approx(50) and found.shares() == {"wait": pytest.approx((0.5 + 0.3) / 4)}
    assert ("notice", "20.00 % of the training time was spent waiting for data") not in advice(found)


def test_long_curves_are_thinned_by_means() -> None:
    x = np.arange(10 * MAX_POINTS, dtype=np.float64)
    few, means = thinned(x, 2 * x)
    assert len(few) == MAX_POINTS and few[0] == 4.5 and np.allclose(means, 2 * few)
    assert (
        thinned(x[:5], x[:5])[0] is not None and len(thinned(x[: MAX_POINTS + 1], x[: MAX_POINTS + 1])[0]) == MAX_POINTS
    )
    assert [samples_text(v) for v in (0, 999, 1500, 2e6, 3e9)] == ["0", "999", "1.5k", "2M", "3G"]


PLOTS = "confusion gradient_norm learning_rate loading loss network recall reliability speed time_by_rank top1"


def test_the_command_writes_page_and_plots_and_changes_nothing_else(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run / 'report.html'} written (") and f"11 plots in {run / 'plots'}" in out
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    drawn = {path: after.pop(path) for path in list(after) if path.parent == run / "plots"}
    assert after.pop(run / "report.html").startswith(b"<!doctype html>") and after == before
    assert sorted(path.name for path in drawn) == [f"{name}.png" for name in PLOTS.split()]
    for png in drawn.values():
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.width > 800, "on a card of its own"
            assert len(image.getcolors(1 << 20) or []) > 20, "something is drawn"
            title = image.crop((0, 0, image.width, 40))
            assert title.getextrema()[0][0] < 100 < 250 < title.getextrema()[0][1], "and what it is stands above"


def test_plots_lie_beside_the_page_and_of_several_runs_there_are_none(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs / "plain"), "--output", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "plots" / "loss.png").is_file() and not (runs / "plain" / "plots").exists()
    (tmp_path / "both").mkdir()
    both = [str(runs / name) for name in ("plain", "hostile")]
    assert main(["report", *both, "--output", str(tmp_path / "both" / "b.html")]) == 0
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["b.html"]


def test_each_ranks_time_is_on_the_page(runs: Path) -> None:
    run = facts(runs / "hostile")
    assert [rank.rank for rank in run.times] == [0, 1] and all(rank.whole > 0 for rank in run.times)
    words = _Seen(page([run])).words
    assert "Where the time of the steps went, by rank" in words and "hostile: time of each rank in numbers" in words


def test_of_many_ranks_those_are_drawn_that_the_others_wait_for(runs: Path) -> None:
    seconds = dict.fromkeys((*PARTS, *LOADING), 1.0)
    ranks = [RankTimes(rank, seconds | {"reduce": 100.0 - rank}) for rank in range(MAX_RANKS + 20)]
    run = dataclasses.replace(facts(runs / "plain"), times=ranks)
    (title,) = (plot.title for plot in speed([run]) if plot.name == "time_by_rank")
    assert title == f"Where the time of the steps went, by rank (the {MAX_RANKS} that wait least for others)"
    words = _Seen(page([run])).words
    assert len(re.findall(r"time of each rank in numbers", words)) == 1


def test_bars_of_recall_begin_at_nothing() -> None:
    """Of classes that are all found nearly always, too: the length of a bar is its value."""
    counts = ((0, 0, 99), (0, 1, 1), (1, 1, 100))
    found = Outcome("val", 1, 1, 1, ("a", "b"), {}, counts, (), (), ())
    axes = Figure().add_subplot()
    class_bars(found)(axes, LIGHT)
    assert axes.get_xlim() == (0, 100.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is no run folder: it has no config.toml"),
        (["."], ". is no run folder: it has no config.toml"),
        (["plain", "plain"], "the same run folder is named twice"),
        (["plain", "--output", "."], "--output . is a folder: give the name of a page, such as report.html"),
        (["plain", "--output", "no/such/place.html"], "cannot write no/such/place.html: No such file or directory"),
    ],
)
def test_bad_flags_are_one_line(
    words: list[str], said: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"distcnn report: error: {said}") and err.count("\n") == 1

"""webdataset's side: the exact reader as its source, its streams as a loader."""

from __future__ import annotations

import json
import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from shard_files import jpg, labelled, write_tar
from split_files import CLASSES, add_shard, make_split, split_of

from distcnn.config import parse_train
from distcnn.data.decode import decode
from distcnn.data.loader import Tile, training_requests
from distcnn.data.manifest import Manifest, save_manifest
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.stream import ExactSource, Stream, StreamLoader, pipeline, stream_shards
from distcnn.data.views import View
from distcnn.errors import DataError, UserError
from distcnn.train import train
from distcnn.world import World

GEOMETRY = Geometry(8, 2)
VIEW = View(12, "none")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    split = make_split(folder, [7, 1, 0, 20, 5])
    save_manifest(Manifest("s", tuple("abcde"), {"train": split}), folder)
    return folder


def decoded(sample: dict[str, bytes]) -> tuple[str, int, bytes]:
    return str(sample["__key__"]), int(sample["cls"]), decode(sample["jpg"]).tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_pipeline_of_webdataset_gets_every_sample_once_and_in_order(root: Path, ranks: int) -> None:
    seen = []
    for rank in range(ranks):
        source = ExactSource(root, seed=3, rank=rank, size=ranks, geometry=GEOMETRY)
        source.set_epoch(2)
        order = EpochOrder(source.reader.counts, GEOMETRY, 3, 2)
        expected = [i for step in training_requests(order, source.lanes) for request in step for i in request.ids]
        got = list(wds.DataPipeline(source, wds.map(decoded)))
        assert [int(key) for key, _, _ in got] == expected
        assert all(label == int(key) % CLASSES for key, label, _ in got)
        seen += expected
    assert sorted(seen) == list(range(33))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_steps(root: Path, workers: int) -> None:
    source = ExactSource(root, geometry=GEOMETRY)
    loader = wds.WebLoader(wds.DataPipeline(source, wds.map(decoded)), batch_size=None, num_workers=workers)
    assert sorted(int(key) for key, _, _ in loader) == list(range(33))


def test_the_source_resumes_at_a_step(root: Path) -> None:
    whole = [sample["__key__"] for sample in ExactSource(root, geometry=GEOMETRY)]
    assert [sample["__key__"] for sample in ExactSource(root, geometry=GEOMETRY, first_step=2)] == whole[16:]


def test_extensions_are_those_of_the_bytes(tmp_path: Path) -> None:
    members = [("a.cls", b"1"), ("a.png", b"\x89PNG"), ("b.cls", b"0"), ("b.jpg", jpg(0))]
    shard = add_shard(tmp_path, "train-0", members, 0, 2)
    save_manifest(Manifest("s", tuple("abcde"), {"train": split_of([shard])}), tmp_path)
    made = {sample["__key__"]: set(sample) for sample in ExactSource(tmp_path, geometry=Geometry(1, 1))}
    assert made["a"] >= {"png", "cls", "__url__"} and made["b"] >= {"jpg", "cls"}


# --loader stream


def stream_of(root: Path, samples: int, rank: int = 0, shards: tuple[str, ...] = ()) -> Stream:
    return Stream(shards or tuple(map(str, sorted(root.glob("train-*3.tar")))), samples, CLASSES, seed=1, rank=rank)


def steps_of(loader: StreamLoader, samples: int, rank: int, ranks: int) -> list[list[Tile]]:
    order = EpochOrder(np.array([samples]), GEOMETRY, 0, 0)
    steps = list(loader.steps(training_requests(order, GEOMETRY.lanes_of(rank, ranks))))
    loader.close()
    return steps


@pytest.mark.parametrize("workers", [0, 2])
def test_more_ranks_than_shards_make_equal_steps(root: Path, workers: int) -> None:
    """One shard, four ranks: webdataset's own split by node would leave three of them nothing, and hang."""
    samples = 45
    counts = []
    for rank in range(4):
        loader = StreamLoader(stream_of(root, samples, rank), VIEW, workers)
        steps = steps_of(loader, samples, rank, 4)
        counts.append([sum(len(tile.labels) for tile in tiles) for tiles in steps])
        for tile in (tile for tiles in steps for tile in tiles):
            assert tile.images.shape[1:] == (12, 12, 3) and tile.images.dtype == torch.uint8
            assert (tile.weights == 1).all() and ((tile.labels >= 0) & (tile.labels < CLASSES)).all()
    assert {len(count) for count in counts} == {6}
    assert sum(map(sum, counts)) == samples


def test_workers_need_not_be_forked(root: Path) -> None:
    """From Python 3.14 on worker processes are started anew, and get the pipeline pickled."""
    made = pipeline(stream_of(root, 20), VIEW)
    first, again = (next(iter(each)) for each in (made, pickle.loads(pickle.dumps(made))))
    assert torch.equal(first.images, again.images) and first.labels.tolist() == again.labels.tolist()


def test_images_and_labels_belong_together(root: Path) -> None:
    loader = StreamLoader(stream_of(root, 60), VIEW, 0)
    known = {decode(jpg(i, 12, 12)).tobytes(): i for i in range(33)}
    for tiles in steps_of(loader, 60, 0, 1):
        for tile in tiles:
            for image, label in zip(tile.images, tile.labels.tolist(), strict=True):
                assert known[image.numpy().tobytes()] % CLASSES == label


def test_ranks_draw_different_samples_and_each_time_they_are_cut_anew(root: Path) -> None:
    view = View(8, "random-resized")
    made = []
    for rank in range(2):
        tiles = [t for step in steps_of(StreamLoader(stream_of(root, 400, rank), view, 0), 400, 0, 1) for t in step]
        made.append({image.numpy().tobytes() for tile in tiles for image in tile.images})
    assert all(len(images) > 150 for images in made), "20 samples, 400 cuts"
    assert made[0] != made[1]


def test_a_command_is_refused_unless_allowed(root: Path) -> None:
    manifest = Manifest("s", tuple("abcde"), {})
    command = f"pipe:cat {shlex.quote(str(root))}/train-00000{{0..4}}.tar"
    with pytest.raises(UserError, match="would run a command in a shell: give --allow-pipe"):
        stream_shards(command, root, manifest, allow_pipe=False)
    shards = stream_shards(command, root, manifest, allow_pipe=True)
    assert shards == [f"pipe:cat {shlex.quote(str(root))}/train-00000{i}.tar" for i in range(5)]
    loader = StreamLoader(stream_of(root, 40, shards=tuple(shards[3:])), VIEW, 1)
    assert sum(len(tile.labels) for tiles in steps_of(loader, 40, 0, 1) for tile in tiles) == 40


def test_a_command_elsewhere_in_the_pattern_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="command"):
        stream_shards(f"{root}/train-000000.tar::pipe:cat x", root, Manifest("s", ("a", "b"), {}), allow_pipe=False)


BROKEN = [
    ("pipe:exit 3", "status 3"),
    ("pipe:echo no tar", "header"),
    ("pipe:true", "empty|no images"),
    ("/nowhere/x.tar", "No such file"),
]


@pytest.mark.parametrize(("shard", "message"), BROKEN)
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_give_nothing_end_the_run_and_do_not_hang_it(
    root: Path, shard: str, message: str, workers: int
) -> None:
    loader = StreamLoader(stream_of(root, 20, shards=(shard,)), VIEW, workers)
    with pytest.raises(DataError, match=f"10 shards in a row gave nothing.*({message})"):
        steps_of(loader, 20, 0, 1)
    loader.close()


def test_one_broken_shard_among_good_ones_is_reported(root: Path) -> None:
    good = stream_of(root, 1).shards
    loader = StreamLoader(stream_of(root, 300, shards=(*good, "/nowhere/x.tar")), VIEW, 0)
    assert len(steps_of(loader, 300, 0, 1)) == 38
    assert {bad.shard for bad in loader.stats.bad} == {"/nowhere/x.tar"}


def test_bad_samples_are_left_out_and_named(tmp_path: Path) -> None:
    members = [*labelled([0, 1, 2]), ("bad.cls", b"1"), ("bad.jpg", b"no"), ("big.cls", b"9"), ("big.jpg", jpg(0))]
    members += [("none.cls", b"1"), ("pickle.pyd", b"\x80\x04"), ("word.cls", b"cat"), ("word.jpg", jpg(1))]
    tar = write_tar(tmp_path / "x.tar", members)
    loader = StreamLoader(stream_of(tmp_path, 50, shards=(str(tar),)), View(8, "none"), 0)
    tiles = [tile for tiles in steps_of(loader, 50, 0, 1) for tile in tiles]
    assert {int(label) for tile in tiles for label in tile.labels} == {0, 1, 2}
    reasons = {bad.key: bad.reason for bad in loader.stats.bad}
    assert set(reasons) == {"bad", "big", "none", "word"}
    assert "label '9' is none of the 5 classes" in reasons["big"] and reasons["none"] == "no image"


def test_an_epoch_must_have_a_length(root: Path) -> None:
    with pytest.raises(UserError, match="--stream-samples"):
        stream_of(root, 0)


@pytest.mark.parametrize(("flags", "message"), [([], "--allow-pipe"), (["--allow-pipe"], "--stream-samples")])
def test_training_on_a_command_needs_leave_and_a_length(
    digits_set: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    command = f"pipe:cat {digits_set}/train-000000.tar"
    base = shlex.split(f"--data {digits_set} --output {tmp_path}/run --wandb-mode disabled --quiet --loader stream")
    config = parse_train([*base, "--train-split", command, *flags])
    with pytest.raises(UserError, match=message):
        train(config, World())


def test_training_on_a_command(digits_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"pipe:cat {digits_set}/train-000000.tar"
    base = shlex.split(f"--data {digits_set} --output {tmp_path}/run --wandb-mode disabled --quiet --loader stream")
    length = shlex.split("--allow-pipe --stream-samples 640 --epochs 2 --decode-threads 1")
    config = parse_train([*base, "--train-split", command, *length])
    results = train(config, World())
    assert results["val/top1"] > 0.3
    rows = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": epoch, "samples": 640, "exactly_once": False} for epoch in range(2)]
    printed = " ".join(capsys.readouterr().err.split())
    assert "drawn with replacement; neither that each comes once, nor the same run" in printed

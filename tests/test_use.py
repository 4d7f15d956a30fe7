"""Using what was trained: load_model, predict, evaluate, export, on a real run of the digits."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distcnn import load_model
from distcnn.classifier import find_checkpoint
from distcnn.cli import main
from distcnn.data.manifest import load_manifest
from distcnn.data.shards import SplitReader
from distcnn.errors import UserError
from distcnn.metrics import Evaluation
from distcnn.scoring import mcnemar
from tests.support import ROOT, command


@pytest.fixture(scope="module")
def run(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits of 2 epochs, with averaged weights that differ from the trained ones."""
    folder = tmp_path_factory.mktemp("use") / "run"
    flags = ["--data", str(digits_set), "--output", str(folder), "--epochs", "2", "--ema-decay", "0.9"]
    assert main(["train", *flags, "--wandb-mode", "disabled", "--threads", "1", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def files(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder with ten held-out digits as files 0.png .. 9.png, and their labels."""
    folder = tmp_path_factory.mktemp("files")
    reader = SplitReader(digits_set, load_manifest(digits_set).split("val"))
    ids = np.arange(10)
    for number, data in enumerate(reader.read(ids)):
        (folder / f"{number}.png").write_bytes(data)
    return folder, reader.labels(ids).tolist()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_python_interface_names_classes_and_bad_files(run: Path, files: tuple[Path, list[int]]) -> None:
    folder, labels = files
    (folder.parent / "no.png").write_text("no image")
    model = load_model(run / "checkpoints" / "best")
    found = model.predict([*(folder / f"{n}.png" for n in range(10)), folder.parent / "no.png"], top_k=3)
    right = sum(p.label == str(label) for p, label in zip(found, labels, strict=False))
    assert right >= 8  # the run reached about 95 %
    assert all(len(p.labels) == 3 and 0.99 > p.probabilities[1] <= p.probabilities[0] <= 1 for p in found[:10])
    assert found[10].label == "" and "not an image" in found[10].error


def test_averaged_weights_are_the_default_and_differ(run: Path, files: tuple[Path, list[int]]) -> None:
    images = [files[0] / f"{n}.png" for n in range(10)]
    averaged, trained = load_model(run).predict(images), load_model(run, ema=False).predict(images)
    assert [p.probability for p in averaged] != [p.probability for p in trained]


def test_evaluate_gives_the_numbers_of_the_training_run(run: Path, digits_set: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "e.json", tmp_path / "rows.csv"
    flags = ["--data", str(digits_set), "--output", str(out), "--predictions", str(rows), "--compare", str(run)]
    assert main(["evaluate", str(run / "checkpoints" / "latest"), *flags]) == 0
    document, results = json.loads(out.read_text()), json.loads((run / "results.json").read_text())
    assert document["checkpoint"]["top1"] == results["val/top1"]
    assert document["checkpoint"]["loss"] == pytest.approx(results["val/loss"], rel=1e-6)
    assert document["checkpoint"]["confusion"] == results["confusion"]
    lines = read_csv(rows)
    assert len(lines) == results["val_samples"] == 359
    assert sum(line["label"] == line["predicted"] for line in lines) == round(results["val/top1"] * 359)


@pytest.mark.slow
def test_two_processes_evaluate_and_predict_the_same(run: Path, digits_set: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distcnn"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert main(["evaluate", str(run), "--data", str(digits_set), "--output", str(one)]) == 0
    done = command([*start, "evaluate", run, "--data", digits_set, "--output", two], ROOT)
    assert done.code == 0, done.err
    assert (
        json.loads(one.read_text())["checkpoint"]["confusion"] == json.loads(two.read_text())["checkpoint"]["confusion"]
    )
    alone, together = tmp_path / "alone.csv", tmp_path / "together.csv"
    assert main(["predict", str(run), str(digits_set), "--split", "val", "--output", str(alone)]) == 0
    done = command([*start, "predict", run, digits_set, "--split", "val", "--output", together], ROOT)
    assert done.code == 0, done.err
    first, second = (read_csv(path) for path in (alone, together))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert [row["label"] for row in first] == [row["label"] for row in second]


def test_a_table_in_a_table_out(run: Path, files: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, labels = files
    table, out = tmp_path / "test.csv", tmp_path / "submission.csv"
    order = [7, 3, 9, 0, 1]
    table.write_text("id,more\n" + "".join(f"{n}{'.png' if n % 2 else ''},x\n" for n in order))
    assert main(["predict", str(run), str(table), "--images", str(folder), "--output", str(out), "--top-k", "2"]) == 0
    rows = read_csv(out)
    assert list(rows[0]) == ["id", "label", "probability", "label_2", "probability_2"]
    assert [row["id"] for row in rows] == [f"{n}{'.png' if n % 2 else ''}" for n in order]
    assert sum(row["label"] == str(labels[n]) for row, n in zip(rows, order, strict=True)) >= 4


def test_shards_and_json(run: Path, digits_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert main(["predict", str(run), str(digits_set / "val-000000.tar"), "--output", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 359 and rows[0]["classes"][0] in set("0123456789")


def test_an_image_of_another_size_is_scaled(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "white").save(tmp_path / "wide.png")
    (prediction,) = load_model(run).predict([tmp_path / "wide.png"])
    assert prediction.label and not prediction.error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict", "nowhere", "{table}"], "no checkpoint nowhere"),
        (["predict", "{run}", "missing.png"], "no file or folder missing.png"),
        (["predict", "{run}", "{table}", "--image-column", "idd"], "did you mean 'id'"),
        (["predict", "{run}", "{table}"], "row 2: no image 'absent'"),
        (["predict", "{run}", "{data}", "--split", "tset"], "no split 'tset'"),
        (["evaluate", "{run}", "--data", "nowhere"], "no dataset.json in nowhere"),
        (["export", "{run}", "--output", "/nowhere/x.pt"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, run: Path, digits_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id\nabsent\n")
    assert main([word.format(run=run, table=table, data=digits_set) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_a_folder_without_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["torchscript", "exported-program", "onnx", "safetensors"])
def test_exports_agree_with_the_checkpoint(kind: str, run: Path, digits_set: Path, tmp_path: Path) -> None:
    file = tmp_path / f"model.{kind}"
    assert main(["export", str(run), "--format", kind, "--output", str(file), "--data", str(digits_set)]) == 0
    assert file.stat().st_size > 100_000
    facts = json.loads((tmp_path / "classes.json").read_text())
    assert facts["classes"] == list("0123456789") and "8, 8" in facts["input"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.json", file.name]


def test_an_export_that_differs_is_not_written(run: Path, digits_set: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    words = ["export", str(run), "--format", "torchscript", "--output", str(file), "--data", str(digits_set)]
    assert main([*words, "--tolerance", "-1"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_load_into_plain_torchvision(stripes_set: Path, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    flags = ["--data", str(stripes_set), "--output", str(tmp_path / "r"), "--epochs", "1", "--model", "resnet18"]
    flags += ["--image-size", "16", "--stem", "imagenet", "--tile-size", "32", "--wandb-mode", "disabled", "--quiet"]
    assert main(["train", *flags]) == 0
    model = load_model(tmp_path / "r")
    plain = resnet18(num_classes=len(model.classes))
    plain.load_state_dict(model.model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(x), model.model(x))


def test_mcnemar() -> None:
    def evaluation(right: list[bool]) -> Evaluation:
        rows = np.zeros((len(right), 6))
        rows[:, 0] = np.arange(len(right))
        rows[:, 2] = [0 if ok else 1 for ok in right]
        return Evaluation(rows, ("a", "b"))

    first = evaluation([True] * 12 + [False] * 3)
    second = evaluation([True] * 2 + [False] * 10 + [True] + [False] * 2)
    # 10 against 1 of 11: twice the tail of a fair coin, (1 + 11) / 2^11, twice
    assert mcnemar(first, second) == (10, 1, pytest.approx(2 * 12 / 2**11))
    assert mcnemar(first, first) == (0, 0, 1.0)

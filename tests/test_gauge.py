from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from distcnn.config import TrainConfig, from_flat
from distcnn.describe import describe
from distcnn.gauge import TERA, Gauge, gauge_of, kind_of, peak_flops, training_flops
from distcnn.job import Job
from distcnn.report.curves import speed
from distcnn.report.gather import gather
from distcnn.report.summary import summary
from distcnn.results import gauge_rows
from distcnn.runfolder import METRICS, read_rows
from tests.harness import simulate, small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.5),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "tf32", 14),  # it has none, and computes in fp32
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_peaks(device: str, kind: str, tera: float | None) -> None:
    assert peak_flops(device, kind) == (tera * TERA if tera else None)


def test_what_products_are_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [kind_of(precision) for precision in ("bf16", "fp16")] == ["bf16", "fp16"]
    for allowed, kind in ((True, "tf32"), (False, "fp32")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert kind_of("no") == kind


def flops(**values: object) -> tuple[int, int]:
    """(of training, of a forward pass) of an image of 64 px and ten classes."""
    config: TrainConfig = from_flat(values)
    return training_flops(config.model, 10, 64), 2 * sum(row.multiply_adds for row in describe(config, 10, 64).layers)


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "resnet9"])
def test_a_training_pass_is_three_forward_passes_without_the_images_own_gradient(model: str) -> None:
    """Grouped convolutions among them, which torch's own counter takes for full ones."""
    size = {"vit_b_16": 224}.get(model, 64)
    config = from_flat({"model": model})
    layers = describe(config, 10, size).layers
    forward, first = sum(row.multiply_adds for row in layers), layers[0].multiply_adds
    assert training_flops(config.model, 10, size) == 2 * (3 * forward - first)


def test_frozen_layers_cost_a_forward_pass() -> None:
    whole, forward = flops(model="resnet18")
    frozen, _ = flops(model="resnet18", pretrained="imagenet", freeze="backbone")
    head = 2 * 512 * 10
    assert frozen == forward + head < whole, "of the last layer the weights' gradient"


def test_a_gauge() -> None:
    assert Gauge(CPU, 10, 1000.0).row(50.0) == {"perf/mfu": 0.5}
    assert gauge_of(from_flat({}), 10, 8, CPU, 1) == Gauge(CPU) and Gauge(CPU).row(50.0) == {}


@pytest.mark.parametrize(
    ("name", "values", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", {"mixed_precision": "bf16"}, 4 * 312 * TERA),
        ("NVIDIA A100-SXM4-40GB", {"progressive": [8, 12], "crop": "random-resized"}, 0),
        ("Some other GPU", {}, 0),
    ],
)
def test_the_gauge_of_a_gpu(name: str, values: dict[str, object], peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = gauge_of(from_flat(values), 10, 32, torch.device("cuda", 0), 4)
    assert found.peak == peak and bool(found.flops) == bool(peak)


def test_where_a_run_shows_it(stripes_set: Path, tmp_path: Path) -> None:
    """As it is where a peak is known; and that a CPU's run is silent about it."""

    def known(job: Job) -> None:
        job.gauge = Gauge(CPU, flops=1000, peak=1e9)

    for name, on_job in (("known", known), ("not", lambda job: None)):
        results = simulate(small_config(stripes_set, tmp_path / name, epochs=1), 2, on_job)
        (run,) = gather([tmp_path / name])
        rows = [row for row in read_rows(tmp_path / name / METRICS) if "train/loss" in row]
        assert ("mfu" in results) == ("MFU" in summary(run)) == ("perf/mfu" in rows[0]) == (name == "known")
        assert sum(plot.title.startswith("MFU") for plot in speed([run])) == (name == "known")
        if name == "known":
            assert results["mfu"] == pytest.approx(results["images_per_second"] * 1e-6)
            assert all(math.isclose(row["perf/mfu"], row["perf/images_per_second"] * 1e-6) for row in rows)


def test_the_rows_of_the_table_at_the_end() -> None:
    assert gauge_rows({}) == {}
    found = gauge_rows({"mfu": 0.4123, "gpu_memory_bytes": 3 << 30, "gpu_reserved_bytes": 5 << 29})
    assert found["MFU"].startswith("41.23 %") and found["GPU memory"] == "3.0 GiB at most, 2.5 GiB reserved"

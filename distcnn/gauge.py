"""How much of its GPUs a run uses: their memory, and of their arithmetic the share that the network itself needs.

That share is the model FLOPs utilization of Chowdhery et al., "PaLM", 2022, appendix B: operations of forward and
backward that the mathematics asks for, for each second, over the peak of the hardware. What else is computed (a
teacher, averaged weights, augmentation) does not count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distcnn.config import ModelConfig, TrainConfig
from distcnn.shapes import meta_model

TERA = 1e12

# 10^12 operations a second of dense products, summed in float32, by torch's name of the device. From NVIDIA's data
# sheets, whose figures "with sparsity" are twice these: A100 (2021), A10 and A40 (2021), H100 (2023), H200 (2024), L4
# and L40S (2023), V100 (2020), T4 (2019); of the GeForce cards from the white papers on the Ampere GA102 (2021) and Ada
# (2023) architectures, appendix A. What a card lacks is left out: V100 and T4 know neither bf16 nor tf32.
# Written down without the sheets at hand: compare a figure with its sheet before you rely on it.
PEAKS: dict[str, dict[str, float]] = {
    r"NVIDIA A100.*": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    r"NVIDIA A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    r"NVIDIA A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    r"NVIDIA H100 \d+GB HBM3": {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67},
    r"NVIDIA H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    r"NVIDIA H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 417.5, "fp32": 60},
    r"NVIDIA H200": {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67},
    r"NVIDIA H200 NVL": {"bf16": 835, "fp16": 835, "tf32": 417.5, "fp32": 60},
    r"NVIDIA L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    r"NVIDIA L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    r"(Tesla|NVIDIA) V100-SXM.*": {"fp16": 125, "fp32": 15.7},
    r"(Tesla|NVIDIA) V100-PCIE.*": {"fp16": 112, "fp32": 14},
    r"(Tesla|NVIDIA) T4": {"fp16": 65, "fp32": 8.1},
    r"NVIDIA GeForce RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
}


def peak_flops(device: str, kind: str) -> float | None:
    """Operations a second of a GPU of this name in bf16, fp16, tf32 or fp32; None where it is not known.

    A part of a GPU (MIG) has another name, and so no peak. What has no tf32 computes in fp32 instead.
    """
    known = next((peaks for pattern, peaks in PEAKS.items() if re.fullmatch(pattern, device)), {})
    found = known.get(kind, known.get("fp32") if kind == "tf32" else None)
    return found * TERA if found else None


def kind_of(precision: str) -> str:
    """What products are made in under `--mixed-precision`: bf16, fp16, tf32 or fp32."""
    if precision != "no":
        return precision
    return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"


def training_flops(config: ModelConfig, classes: int, size: int) -> int:
    """Operations of forward and backward for one (3, size, size) image; a multiplication and an addition are two.

    Counted while the network runs on the meta device: matrix products and convolutions, and of the backward pass those
    that are made, so that frozen layers cost a forward pass only.
    """
    model = meta_model(config, classes, size).train()
    images = torch.empty((2, 3, size, size), device="meta")  # batch norm refuses one value for each channel
    with _Operations() as counter:
        model(images).sum().backward()
    total: int = counter.total
    return total // 2


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of all products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            # Torch's own formula forgets the groups: a depthwise convolution would count as a full one.
            gradient, _, weight = args[:3]
            self.total += 2 * gradient.numel() * weight[0].numel() * sum(args[-1][:2])
        elif func.overloadpacket in flop_registry:
            self.total += int(flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result))
        return result


@dataclass(frozen=True)
class Gauge:
    """What is read off the GPUs of a run. `peak`: of all processes together, operations a second; 0 if not known."""

    device: torch.device
    flops: int = 0  # of training, an image
    peak: float = 0.0

    def row(self, images_per_second: float) -> dict[str, float]:
        """Columns of metrics; none on a CPU. The memory is this process's at its highest; nobody waits for the GPU."""
        values: dict[str, float] = {}
        if self.device.type == "cuda":
            values["perf/gpu_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
            values["perf/gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        if self.peak:
            values["perf/mfu"] = images_per_second * self.flops / self.peak
        return values


def gauge_of(config: TrainConfig, classes: int, size: int, device: torch.device, processes: int) -> Gauge:
    """The gauge of a run of as many processes, each with a GPU like this one's.

    Without a peak where none is known, and where images have no one size (--progressive).
    """
    if device.type != "cuda":
        return Gauge(device)
    peak = peak_flops(torch.cuda.get_device_name(device), kind_of(config.run.mixed_precision))
    if peak is None or config.data.progressive:
        return Gauge(device)
    return Gauge(device, training_flops(config.model, classes, size), processes * peak)

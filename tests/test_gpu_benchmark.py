"""What of the benchmark of a GPU can be tried without one: its counts, its names, and what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import ROOT, command

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import roof
import scaling


def test_a_convolution_is_counted_by_hand() -> None:
    x_NCHW = torch.empty(2, 8, 10, 10, device="meta")
    found = roof.kernels_of(nn.Conv2d(8, 16, 3, padding=1, bias=False, device="meta"), x_NCHW)
    ins, outs, weights = 2 * 2 * 8 * 100, 2 * 2 * 16 * 100, 2 * 16 * 8 * 9
    assert [kernel.operations for kernel in found] == [2 * 2 * 16 * 100 * 8 * 9] * 3
    assert [kernel.bytes for kernel in found] == [ins + outs + weights] * 3
    first = roof.kernels_of(nn.Conv2d(3, 16, 3, device="meta"), torch.empty(2, 3, 10, 10, device="meta"))
    assert len(first) == 2, "of images nobody needs the gradient"


def test_resnet50_is_what_others_count() -> None:
    """4.09 billion multiply-adds forward (He et al. 2016 and torchvision), thrice for training but for the first."""
    kernels = roof.kernels_of(roof.build("resnet50", 224), torch.empty(4, 3, 224, 224, device="meta"))
    operations = sum(kernel.operations for kernel in kernels) / 4
    assert operations == pytest.approx(2 * (3 * 4.089e9 - 0.118e9), rel=0.001)
    rates = [roof.images_per_second(kernels, 4, 989e12, 3350e9, level) for level in roof.LEVELS]
    assert rates == sorted(rates) and 5000 < rates[0] < 7500


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
            "convolutions, products",
        ),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>", "batch norm"),
        ("void at::native::max_pool_forward_nhwc<c10::BFloat16>", "pooling"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "element by element"),
        ("triton_poi_fused_relu_3", "fused by the compiler"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgd>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "sums over processes"),
        ("void something_new()", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert gpu.kind_of(name) == kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = command([ROOT / "benchmarks" / "gpu.sh"], tmp_path, PYTHON=sys.executable)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1 and "no GPU" in done.err


def test_the_tables_of_the_model_on_paper_are_what_it_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    scaling.main()
    written = (ROOT / "benchmarks" / "SCALING.md").read_text().splitlines()
    missing = [line for line in capsys.readouterr().out.splitlines() if line not in written]
    assert not missing, "python benchmarks/scaling.py, and copy them"


def test_ways_agree_where_they_must() -> None:
    """Of two ranks there is one way; by node is chunks on one node; nothing beats the bytes of a ring."""
    net = scaling.Network("", 1e9, 1e9, latency=0.0)
    for way in (scaling.ring, scaling.pairs, scaling.chunks, scaling.stages):
        assert way(1e9, 2, net) == pytest.approx(1.0)
    assert scaling.stages(1e9, 8, net) == scaling.chunks(1e9, 8, net) == scaling.ring(1e9, 8, net)
    assert scaling.exposed([(2.0, 1), (1.0, 1), (0.0, 1)], lambda size: 0.5 * size) == pytest.approx(0.5)
    assert scaling.exposed([(2.0, 1), (1.0, 1)], lambda size: 0.1 * size) == 0

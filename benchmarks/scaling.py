"""The tables of SCALING.md: what 8 and 64 GPUs would make of a ResNet-50, computed from stated speeds and not measured.

    python benchmarks/scaling.py [--rate 2791] [--batch 256]

--rate: images a second of one GPU by itself; --batch: images a step of one GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from roof import build, kernels_of

GRADIENT_BYTES = 4  # float32, whatever the forward pass computes in
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, DDP's own
STATISTICS = 2 * 26_560 * 8  # bytes: mean and variance of each channel that batch norm sees, in float64
BACKWARD_SHARE = 2 / 3
FILE_BYTES, PIXELS = 110_000, 224 * 224 * 3  # of an ImageNet JPEG in the mean; of an image on its way to the GPU
CORE_RATE = 630  # images of 500x375 px that a core decodes a second (LOG.md's machine)
PRODUCT_OPERATIONS, MEMORY_BYTES = 989e12, 3350e9  # a second, to share the backward pass out among the layers


@dataclass(frozen=True)
class Network:
    """Bytes a second and seconds of latency a message: within a node a GPU's, between nodes a node's."""

    name: str
    inside: float
    between: float
    latency: float = 10e-6
    node: int = 8  # GPUs


NETWORKS = (
    Network("NVLink 350 GB/s; 8 x 400 Gbit/s a node", 350e9, 360e9),
    Network("NVLink 350 GB/s; 100 Gbit/s a node", 350e9, 11e9),
    Network("PCIe 20 GB/s; 25 Gbit/s a node", 20e9, 2.8e9),
)


def ring(size: float, ranks: int, net: Network) -> float:
    """Seconds of a ring all-reduce: 2 (R - 1) / R of the bytes pass every link between neighbours, also those that
    lead from node to node, of which there is one a node in each direction."""
    slowest = net.inside if ranks <= net.node else min(net.inside, net.between)
    return 2 * (ranks - 1) / ranks * size / slowest + 2 * (ranks - 1) * net.latency


def pairs(size: float, ranks: int, net: Network) -> float:
    """Recursive doubling: log2(R) times all bytes with one partner. Between nodes all GPUs of a node do so at once."""
    seconds = 0.0
    for level in range(int(math.log2(ranks))):
        leaves_node = 1 << level >= net.node
        seconds += size / (min(net.inside, net.between / net.node) if leaves_node else net.inside) + 2 * net.latency
    return seconds


def chunks(size: float, ranks: int, net: Network) -> float:
    """Each rank adds one R-th of all: pieces to their owners, and the sums back. The same tree, the same bits.

    The pieces of all GPUs of a node for other nodes leave it by its one way out; the sums come back in a ring.
    """
    scatter = (ranks - 1) / ranks * size / net.inside
    if ranks > net.node:
        scatter = max(scatter, net.node * (ranks - net.node) / ranks * size / net.between)
    gather = (ranks - 1) / ranks * size / (net.inside if ranks <= net.node else min(net.inside, net.between))
    return scatter + gather + 2 * (ranks - 1) * net.latency


def stages(size: float, ranks: int, net: Network) -> float:
    """Chunks among the ranks of a node, and of each chunk chunks among the nodes: the tree's bits, a ring's bytes."""
    if ranks <= net.node:
        return chunks(size, ranks, net)
    nodes = ranks // net.node
    inside, between = (2 * (n - 1) / n * size for n in (net.node, nodes))
    return inside / net.inside + between / min(net.inside, net.between) + 2 * (net.node + nodes - 2) * net.latency


WAYS: dict[str, Callable[[float, int, Network], float]] = {
    "ring": ring,
    "pairs": pairs,
    "chunks": chunks,
    "chunks by node": stages,
}


def buckets(step_seconds: float, batch: int) -> list[tuple[float, int]]:
    """(seconds before the end of the backward pass at which it is ready, bytes) of each of DDP's buckets, in turn.

    The backward pass is shared out among the layers as roof.py counts their kernels.
    """
    model, seen = build("resnet50", 224), []
    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(lambda module, inputs, _: seen.append((module, inputs[0]))) for leaf in leaves]
    model(torch.empty(batch, 3, 224, 224, device="meta"))
    for hook in hooks:
        hook.remove()
    layers = []
    for module, x in seen:
        seconds = sum(kernel.seconds(PRODUCT_OPERATIONS, MEMORY_BYTES) for kernel in kernels_of(module, x))
        layers.append((seconds, sum(p.numel() for p in module.parameters()) * GRADIENT_BYTES))
    left = BACKWARD_SHARE * step_seconds
    scale = left / sum(seconds for seconds, _ in layers)
    found: list[tuple[float, int]] = []
    filled = 0
    for seconds, size in reversed(layers):
        left, filled = left - seconds * scale, filled + size
        if filled >= (BUCKET if found else FIRST_BUCKET):
            found.append((max(left, 0.0), filled))
            filled = 0
    return [*found, (0.0, filled)] if filled else found


def exposed(ready: list[tuple[float, int]], seconds: Callable[[int], float]) -> float:
    """Seconds by which the sums outlast the backward pass, one bucket after the other beside it."""
    end = -ready[0][0]
    for before_the_end, size in ready:
        end = max(end, -before_the_end) + seconds(size)
    return max(end, 0.0)


def print_volume(parameters: int) -> None:
    size = parameters * GRADIENT_BYTES
    print(f"A ResNet-50 has {parameters:,} parameters: {size / 1e6:.0f} MB of gradients in float32.\n")
    table("GPUs", "ring or chunks: 2 (R-1)/R", "pairs: log2 R")
    for ranks in (2, 4, 8, 64):
        factors = (2 * (ranks - 1) / ranks, math.log2(ranks))
        row(ranks, *(f"{factor * size / 1e6:.0f} MB" for factor in factors))


def print_times(rate: float, batch: int, parameters: int) -> None:
    step, size = batch / rate, parameters * GRADIENT_BYTES
    ready = buckets(step, batch)
    texts = ", ".join(f"{number / 1e6:.0f} MB {1e3 * before:.0f} ms" for before, number in ready)
    print(f"\nA step of {batch} images at {rate:,.0f} images/s takes {1e3 * step:.0f} ms. Buckets, and how long before")
    print(f"the end of the backward pass they are ready: {texts}.\n")
    table("network", "GPUs", "way", "sums, ms", "beyond the backward pass, ms", "of linear")
    for net in NETWORKS:
        for ranks, ways in ((8, ("ring", "pairs", "chunks")), (64, tuple(WAYS))):
            for name in ways:
                one = partial(_seconds, WAYS[name], ranks, net)
                late = exposed(ready, one)
                row(net.name, ranks, name, f"{1e3 * one(size):.1f}", f"{1e3 * late:.1f}", f"{step / (step + late):.1%}")

    print(f"\nAt the end of each step {STATISTICS / 1e3:.0f} kB more: batch norm's statistics and the loss.\n")
    table("network", "8 GPUs, pairs, ms", "64 GPUs, chunks by node, ms")
    for net in NETWORKS:
        row(net.name, *(f"{1e3 * way(STATISTICS, n, net):.2f}" for way, n in ((pairs, 8), (stages, 64))))


def _seconds(way: Callable[[float, int, Network], float], ranks: int, net: Network, size: float) -> float:
    return way(size, ranks, net)


def print_supply(rates: tuple[float, ...]) -> None:
    print()
    table("images/s a GPU", "cores that decode", "files, MB/s", "to the GPU, MB/s", "8 GPUs, GB/s", "64 GPUs, GB/s")
    for rate in rates:
        files, pixels = rate * FILE_BYTES, rate * PIXELS
        of_all = [f"{number * files / 1e9:.1f}" for number in (8, 64)]
        row(f"{rate:,.0f}", f"{rate / CORE_RATE:.1f}", f"{files / 1e6:.0f}", f"{pixels / 1e6:.0f}", *of_all)


def table(*names: str) -> None:
    row(*names)
    print("|" + " --- |" * len(names))


def row(*values: object) -> None:
    print(f"| {' | '.join(map(str, values))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2791.0)
    parser.add_argument("--batch", type=int, default=256)
    asked = parser.parse_args()
    parameters = sum(p.numel() for p in build("resnet50", 224).parameters())
    print_volume(parameters)
    print_times(asked.rate, asked.batch, parameters)
    print_supply((asked.rate, 7050.0))


if __name__ == "__main__":
    main()

"""What saving costs training: ResNet-50 with AdamW and averaged weights, saved by the run's own Writer.

    python benchmarks/checkpoint.py --pairs 9

Windows of steps with one save at their beginning alternate with windows without; each is long enough for the save to
end within it. The cost of a save is the difference of a pair's durations: the copy, for which training waits, and what
hashing and writing take from the cores meanwhile. The median over the pairs, as a share of 100 steps, is the result.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet50

from distcnn import checkpoint
from distcnn.ema import Ema

STEPS_BETWEEN_SAVES = 100


class Training:
    """Steps on random images, with nothing but the network and the optimizer in them."""

    def __init__(self, batch: int, pixels: int) -> None:
        torch.manual_seed(0)
        self.model = resnet50().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ema = Ema(self.model, 0.999)
        self.x_NCHW = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 1000, (batch,))

    def step(self) -> None:
        nn.functional.cross_entropy(self.model(self.x_NCHW), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def save(self, writer: checkpoint.Writer, step: int) -> float:
        """Begin a save; the seconds for which training waits."""
        begun = time.perf_counter()
        trainer: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "scaler": {}}
        writer.save(step, self.model.state_dict(), self.ema.model.state_dict(), trainer, {})
        return time.perf_counter() - begun


def window(training: Training, steps: int, writer: checkpoint.Writer | None, number: int) -> tuple[float, float]:
    """(seconds of a window, those for which it waited for the copy); ends when the save has ended."""
    begun = time.perf_counter()
    waited = training.save(writer, number) if writer else 0.0
    for _ in range(steps):
        training.step()
    if writer:
        writer.wait()
    return time.perf_counter() - begun, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of a window")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    training = Training(options.batch, options.pixels)
    for _ in range(3):
        training.step()
    costs, waits, plain = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        writer = checkpoint.Writer(Path(name), 1, print)
        window(training, 1, writer, 0)
        size = sum(file.stat().st_size for file in Path(name).glob("checkpoints/step_*/*"))
        for pair in range(options.pairs):
            order = (False, True) if pair % 2 else (True, False)
            found = {saves: window(training, options.steps, writer if saves else None, pair + 1) for saves in order}
            costs.append(found[True][0] - found[False][0])
            waits.append(found[True][1])
            plain.append(found[False][0] / options.steps)
    step = statistics.median(plain)
    cost = statistics.median(costs)
    print(
        f"state {size / 1e6:.0f} MB; {options.batch} images of {options.pixels} px a step, {step * 1e3:.0f} ms a step"
    )
    print(
        f"a save costs {cost * 1e3:.0f} ms, median of {options.pairs} pairs ({min(costs) * 1e3:.0f} to"
        f" {max(costs) * 1e3:.0f}); of these training waits {statistics.median(waits) * 1e3:.0f} ms for the copy; a"
        f" save by itself takes up to {writer.seconds:.1f} s"
    )
    print(f"one save in {STEPS_BETWEEN_SAVES} steps: {100 * cost / (STEPS_BETWEEN_SAVES * step):.2f} % more time")


if __name__ == "__main__":
    main()

"""What training should compute, written in the plainest way: one process, a loop over tiles, sums in float64.

Nothing of distributed.py, tree.py, batchnorm.py, losses.py, optim.py or evaluate.py is used. What is shared is the
model, the reading of images and the augmentation: those are compared with themselves by the check of the pixels.
N samples of a tile, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from distcnn.augment import Targets
from distcnn.batchnorm import TileBatchNorm2d
from distcnn.build import Dataset, make_augment, make_balance, make_loader, make_model, make_order
from distcnn.config import OptimConfig, TrainConfig, from_flat
from distcnn.data.loader import TileRequest
from distcnn.data.order import EpochOrder, Ids, every_time
from distcnn.distill import load_teacher
from distcnn.tiles import forward_seed

Tensors = dict[str, torch.Tensor]


class PlainBatchNorm2d(nn.BatchNorm2d):
    """Batch norm as its paper writes it (Ioffe & Szegedy, ICML 2015); notes the mean and the unbiased variance."""

    noted: tuple[torch.Tensor, torch.Tensor]

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None and self.running_var is not None
        x = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
        mean, var = self.running_mean, self.running_var
        if self.training:
            n = x.numel() // x.shape[1]
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
            self.noted = mean.detach().double(), var.detach().double() * (n / max(n - 1, 1))
        y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + self.eps)
        y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x_NCHW.dtype)


@dataclass
class Step:
    """One step by the reference. Statistics: lane -> name of a buffer -> value of that lane's tile alone, float64.

    shares: what each lane's tile adds to the gradient, flat; only where asked for.
    """

    sizes: list[int]
    gradients: Tensors = field(default_factory=dict)
    statistics: dict[int, Tensors] = field(default_factory=dict)
    shares: dict[int, torch.Tensor] = field(default_factory=dict)


class Reference:
    """Computes steps and evaluations of a short run again."""

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        torch.set_num_threads(config.run.threads)
        self.config, self._dataset = config, dataset
        self._counts = shard_counts(dataset, config.data.train_split)
        self.loader = make_loader(config, dataset, config.data.train_split, True, 1, False)
        self._balance = make_balance(config, dataset, self.loader.reader)
        self._val = make_loader(config, dataset, config.data.val_split, False, 1, False)
        self._augment = make_augment(config, dataset)
        self._classes = len(dataset.classes)
        self._teacher = load_teacher(config, dataset, torch.device("cpu"))
        self._model = make_model(config, dataset)
        self.norms = {n: m for n, m in self._model.named_modules() if isinstance(m, TileBatchNorm2d)}
        for module in self.norms.values():
            module.__class__ = PlainBatchNorm2d  # type: ignore[assignment]

    def order(self, epoch: int) -> EpochOrder:
        return make_order(self.config, self._counts, epoch, self._balance)

    def expected(self, epoch: int) -> Ids:
        """The ids of all that an epoch should train on, in order."""
        return every_time(self._balance.times(epoch) if self._balance else np.ones(len(self.loader.reader), np.int64))

    def step(self, state: Mapping[str, torch.Tensor], epoch: int, step: int, by_lane: bool = False) -> Step:
        """The gradient of the mean loss over a step's samples, from the weights `state`."""
        self._model.load_state_dict(state, strict=False)
        self._model.train()
        order = self.order(epoch)
        found = Step(order.tile_sizes(step))
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        found.gradients = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
        for lane, size in enumerate(found.sizes):
            if not size:
                continue
            loss = self._tile_loss(TileRequest(epoch, step, lane, order.tile(step, lane))) / sum(found.sizes)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(named, gradients, strict=True):
                found.gradients[name] += gradient
            if by_lane:
                found.shares[lane] = flat(dict(zip(named, gradients, strict=True)))
            found.statistics[lane] = self._noted()
        return found

    def _tile_loss(self, request: TileRequest) -> torch.Tensor:
        """The sum of the losses of a tile's samples."""
        tile = next(iter(self.loader.steps([[request]])))[0]
        x_NCHW, targets = self._augment(tile, torch.device("cpu"), train=True)
        if self._teacher:
            with self._precision():
                targets = self._teacher.teach(x_NCHW, targets)
        torch.manual_seed(forward_seed(self.config.run.seed, request))
        return _plain_loss(self._forward(x_NCHW), targets, self.config.optim, self._factors())

    def _factors(self) -> torch.Tensor:
        """(K,) what each class counts in the loss."""
        counts = np.array(self._dataset.manifest.split(self.config.data.train_split).class_counts, dtype=np.float64)
        power = {"sqrt": 0.5, "inverse": 1.0}.get(self.config.optim.balance, 0.0)
        factors = np.where(counts > 0, np.maximum(counts, 1) ** -power, 0)
        return torch.from_numpy(factors * counts.sum() / (factors * counts).sum()).float()

    def _forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        with self._precision():
            logits_NK: torch.Tensor = self._model(x_NCHW)
        return logits_NK.float()

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.run.mixed_precision == "bf16")

    def _noted(self) -> Tensors:
        noted = {}
        for name, module in self.norms.items():
            assert isinstance(module, PlainBatchNorm2d)
            noted[f"{name}.running_mean"], noted[f"{name}.running_var"] = module.noted
        return noted

    @torch.inference_mode()
    def evaluate(self, weights: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, float]:
        """((K, K) confusion, row the label; mean loss) of the validation split, one image at a time."""
        self._model.load_state_dict(weights, strict=False)
        self._model.eval()
        confusion = np.zeros((self._classes, self._classes), dtype=np.int64)
        losses = []
        for sample in range(len(self._val.reader)):
            request = TileRequest(0, 0, 0, np.array([sample]))
            tile = next(iter(self._val.steps([[request]])))[0]
            x_NCHW, targets = self._augment(tile, torch.device("cpu"), train=False)
            logits_NK = torch.zeros(1, self._classes)
            for share, view_NCHW in _views(x_NCHW, self.config.optim.tta):
                logits_NK += share * self._forward(view_NCHW)
            confusion[int(tile.labels[0]), int(logits_NK.argmax())] += 1
            losses.append(float(_plain_loss(logits_NK, targets, OptimConfig(), torch.ones(self._classes))))
        return confusion, math.fsum(losses) / max(len(losses), 1)

    def pixels(self, requests: list[TileRequest], threads: int, ahead: bool) -> list[torch.Tensor]:
        """The model's inputs for tiles, made by so many threads without a cache, `ahead` of the steps or not."""
        config = from_flat({"cache": "off"}, "verify", base=self.config)
        loader = make_loader(config, self._dataset, config.data.train_split, True, threads, ahead)
        made = []
        for (tile,) in loader.steps([request] for request in requests):
            made.append(self._augment(tile, torch.device("cpu"), train=True)[0].clone())
        loader.close()
        return made


def _views(x_NCHW: torch.Tensor, kind: str) -> list[tuple[float, torch.Tensor]]:
    """What evaluation looks at, and how much each view counts."""
    if kind == "none":
        return [(1.0, x_NCHW)]
    views = [(1.0, x_NCHW)]
    if kind == "flip-shift":
        shift = max(x_NCHW.shape[2] // 32, 1)
        image_CHW = np.pad(x_NCHW[0].numpy(), ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        corner, far = image_CHW[None, :, : -2 * shift, : -2 * shift], image_CHW[None, :, 2 * shift :, 2 * shift :]
        views = [(0.5, x_NCHW), (0.25, torch.from_numpy(corner)), (0.25, torch.from_numpy(far))]
    return [(share / 2, seen) for share, view in views for seen in (view, view.flip(3))]


def shard_counts(dataset: Dataset, split: str) -> Ids:
    """(S,) samples of each shard."""
    return np.array([shard.samples for shard in dataset.manifest.split(split).shards], dtype=np.int64)


def _plain_loss(logits_NK: torch.Tensor, targets: Targets, optim: OptimConfig, factors_K: torch.Tensor) -> torch.Tensor:
    """The sum over the samples of the cross entropy (or the binary ones) with smoothed and mixed labels."""
    classes, smoothing = logits_NK.shape[1], optim.label_smoothing
    wanted_NK = torch.zeros_like(logits_NK)
    rows = torch.arange(len(logits_NK))
    wanted_NK[rows, targets.labels] += targets.share
    wanted_NK[rows, targets.partner_labels] += 1 - targets.share
    if optim.loss == "bce":
        true_NK = (wanted_NK > 0.2).to(logits_NK.dtype) * (1 - smoothing) + smoothing / classes
        apart_NK = true_NK * softplus(-logits_NK) + (1 - true_NK) * softplus(logits_NK)
        return (apart_NK.mean(1) * (wanted_NK * factors_K).sum(1) * targets.weights).sum()
    logs_NK = logits_NK - torch.logsumexp(logits_NK, 1, keepdim=True)
    wanted_NK = (wanted_NK * (1 - smoothing) + smoothing / classes) * factors_K
    loss_N = -(wanted_NK * logs_NK).sum(1)
    if targets.teacher_logits is not None:
        share, hot = optim.distill_weight, optim.distill_temperature
        taught_NK = torch.softmax(targets.teacher_logits.float() / hot, 1)
        said_NK = torch.softmax(logits_NK / hot, 1)
        loss_N = (1 - share) * loss_N + share * hot**2 * (taught_NK * torch.log(taught_NK / said_NK)).sum(1)
    return (loss_N * targets.weights).sum()


def clipped(gradients: Tensors, limit: float) -> Tensors:
    """The gradient scaled down to a norm of at most `limit` (0: as it is)."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    return {name: g * scale for name, g in gradients.items()}


def learning_rate(optim: OptimConfig, steps_per_epoch: int, step: int) -> float:
    """Of step 0, 1, ...: up in equal parts to --lr over the warm-up, then by --schedule down to 0 at the end."""
    warm = round(optim.warmup_epochs * steps_per_epoch)
    whole = optim.epochs * steps_per_epoch
    left = (whole - step) / max(whole - warm, 1)
    if optim.schedule == "one-cycle":
        low, share = (1 / 25, step / warm) if step < warm else (1 / 250_000, left)
        return optim.lr * (low + (1 - low) * math.sin(share * math.pi / 2) ** 2)
    if step < warm:
        return optim.lr * (step + 1) / warm
    if optim.schedule == "step":
        return optim.lr / (1 if 3 * step < whole else 10 if 3 * step < 2 * whole else 100)
    if optim.schedule == "cosine":
        return optim.lr * math.sin(left * math.pi / 2) ** 2
    return optim.lr * left if optim.schedule == "linear" else optim.lr


def relative(mine: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference of two sets of tensors, as a share of the second one's norm. inf for NaN."""
    if all(torch.equal(mine[name], wanted[name]) for name in wanted):
        return 0.0
    apart = math.sqrt(sum(float((mine[name].double() - wanted[name].double()).square().sum()) for name in wanted))
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in wanted.values()))
    found = apart / norm if norm else math.inf
    return found if math.isfinite(found) else math.inf


def along(mine: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """(ratio of the norms, cosine of the angle) of two sets of tensors."""
    dot = sum(float((mine[name].double() * wanted[name].double()).sum()) for name in wanted)
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in side.values())) for side in (mine, wanted)]
    return norms[0] / max(norms[1], 1e-300), dot / max(norms[0] * norms[1], 1e-300)


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All values in the order of the names, (n,)."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

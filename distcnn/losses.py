"""The training loss of a tile: a sum over its samples. The division by the step's samples comes once, elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from distcnn.augment import Targets

TRUE_FROM = 0.2  # bce: the share of a mixed image from which on its label counts as true


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    * ce: cross entropy; with mixed images each label has its share (Zhang et al. 2018, equation 2);
    * bce: the mean over the classes of binary cross entropies, where a label that has more than a fifth of a mixed
      image is true (Wightman et al., "ResNet strikes back", 2021; as timm's recipes A2 and A3 compute it);
    * smoothing: that share of the target is spread over all classes (Szegedy et al., CVPR 2016);
    * class_weights: (K,) factors, by the label; with smoothed ce also of the share of each class, as torch does;
    * distill: the share w of a teacher, where targets have its logits: (1 - w) of the loss above + w T^2 KL(p || q),
      with p and q the teacher's and the student's probabilities at temperature T (Hinton et al. 2015, section 2; T^2
      keeps the size of the gradient, section 2.1).
    """

    kind: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.0
    class_weights: torch.Tensor | None = None
    distill: float = 0.0
    temperature: float = 1.0

    def of(self, logits_NK: torch.Tensor, targets: Targets) -> torch.Tensor:
        """(n,) losses of (n, K) logits."""
        loss_N = self._of_labels(logits_NK, targets)
        if targets.teacher_logits is None:
            return loss_N
        q_NK = (logits_NK / self.temperature).log_softmax(1)
        p_NK = (targets.teacher_logits.to(logits_NK.dtype) / self.temperature).log_softmax(1)
        apart_N = (p_NK.exp() * (p_NK - q_NK)).sum(1)
        return (1 - self.distill) * loss_N + self.distill * self.temperature**2 * apart_N

    def _of_labels(self, logits_NK: torch.Tensor, targets: Targets) -> torch.Tensor:
        if self.kind == "bce":
            return self._binary(logits_NK, targets)
        loss_N = self._cross_entropy(logits_NK, targets.labels)
        if targets.share < 1:
            other_N = self._cross_entropy(logits_NK, targets.partner_labels)
            loss_N = targets.share * loss_N + (1 - targets.share) * other_N
        return loss_N

    def _cross_entropy(self, logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        weights_K = None if self.class_weights is None else self.class_weights.to(logits_NK.dtype)
        return cross_entropy(logits_NK, labels_N, weights_K, reduction="none", label_smoothing=self.smoothing)

    def _binary(self, logits_NK: torch.Tensor, targets: Targets) -> torch.Tensor:
        wanted_NK, classes_K = torch.zeros_like(logits_NK), torch.arange(logits_NK.shape[1], device=logits_NK.device)
        parts = ((targets.labels, targets.share), (targets.partner_labels, 1 - targets.share))
        for labels_N, share in parts:
            if share > TRUE_FROM:
                wanted_NK = torch.where(labels_N[:, None] == classes_K, 1.0, wanted_NK)
        wanted_NK = wanted_NK * (1 - self.smoothing) + self.smoothing / logits_NK.shape[1]
        loss_N = binary_cross_entropy_with_logits(logits_NK, wanted_NK, reduction="none").mean(1)
        if self.class_weights is not None:
            weights_K = self.class_weights.to(logits_NK.dtype)
            loss_N = loss_N * sum(share * weights_K[labels_N] for labels_N, share in parts)
        return loss_N


def loss_sum(logits_NK: torch.Tensor, targets: Targets, loss: Loss = Loss()) -> torch.Tensor:
    """Scalar: the sum of the losses of a tile, each times its sample's weight. Half precision becomes float32 first."""
    logits_NK = logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))
    return (loss.of(logits_NK, targets) * targets.weights).sum()


def balanced_weights(counts: Sequence[int], power: float) -> list[float]:
    """Of each class one over its number of training images to `power`, scaled so that the mean over the images is 1.

    A class without images has 0.
    """
    raw = [count**-power if count else 0.0 for count in counts]
    scale = sum(counts) / sum(count * weight for count, weight in zip(counts, raw, strict=True))
    return [weight * scale for weight in raw]

"""The training loss of a tile: a sum over its samples. The division by the step's samples comes once, elsewhere."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from distcnn.augment import Targets


def loss_sum(logits_NK: torch.Tensor, targets: Targets, label_smoothing: float = 0.0) -> torch.Tensor:
    """Scalar: the weighted sum of the cross entropy over (n, K) logits.

    With mixed images each label has its share (Zhang et al. 2018, equation 2). Label smoothing: Szegedy et al.,
    "Rethinking the Inception architecture", CVPR 2016. Logits of half precision are computed with in float32.
    """
    logits_NK = logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))
    loss_N = cross_entropy(logits_NK, targets.labels, reduction="none", label_smoothing=label_smoothing)
    if targets.share < 1:
        other_N = cross_entropy(logits_NK, targets.partner_labels, reduction="none", label_smoothing=label_smoothing)
        loss_N = targets.share * loss_N + (1 - targets.share) * other_N
    return (loss_N * targets.weights).sum()

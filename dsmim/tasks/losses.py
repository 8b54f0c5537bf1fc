"""The losses of a classification in training, for logits (B, classes) and soft targets (B, classes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples of the cross entropy between softmax and targets that sum to 1, as timm's
    SoftTargetCrossEntropy."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples and classes of the cross entropy between sigmoid and "is this class in the image?".

    Every target above 0 counts as 1, so an image that mixup or CutMix made of two classes has two whole ones. This is
    --bce-loss of facebookresearch/deit (engine.py, torch's BCEWithLogitsLoss): DeiT III's loss on ImageNet-1K.
    """
    return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))


LOSSES: dict[str, Loss] = {"cross_entropy": soft_cross_entropy, "bce": binary_cross_entropy}
"""By the names of task.loss."""

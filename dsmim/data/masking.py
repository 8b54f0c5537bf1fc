"""Random masks of masked image modelling."""

from __future__ import annotations

import math

import torch


def mask_count(patches: int, ratio: float) -> int:
    """Patches hidden: rounded up, as microsoft/SimMIM does (data_simmim.py). 1e-9 keeps 10 × 0.3 at 3."""
    return math.ceil(patches * ratio - 1e-9)


class RandomMask:
    """Draws (img_size/model_patch, same) bool masks, true where hidden, from torch's global RNG.

    All sizes in pixels. Patches of mask_patch pixels are hidden whole. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, img_size: int, mask_patch: int, model_patch: int, ratio: float):
        if img_size % mask_patch or mask_patch % model_patch:
            raise ValueError(
                f"task.mask_patch: {mask_patch} must divide the image ({img_size}) and be a multiple of the model's "
                f"patch ({model_patch})"
            )
        side, scale = img_size // mask_patch, mask_patch // model_patch
        self.patches, self.hidden = side * side, mask_count(side * side, ratio)
        rows = torch.arange(side).repeat_interleave(scale)
        self.cells = rows[:, None] * side + rows  # (h, w) in the model's patches → mask patch

    def __call__(self) -> torch.Tensor:
        return (torch.randperm(self.patches) < self.hidden)[self.cells]

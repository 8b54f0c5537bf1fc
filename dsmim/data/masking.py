"""Random masks of masked image modelling."""

from __future__ import annotations

import math

import torch


def mask_count(patches: int, ratio: float) -> int:
    """Patches hidden: rounded up, as microsoft/SimMIM does (data_simmim.py). 1e-9 keeps 10 × 0.3 at 3."""
    return math.ceil(patches * ratio - 1e-9)


def random_mask(img_size: int, mask_patch: int, model_patch: int, ratio: float) -> torch.Tensor:
    """(img_size/model_patch, same) bool, true where hidden, from torch's global RNG.

    All sizes in pixels. Patches of mask_patch pixels are hidden whole.
    """
    if img_size % mask_patch or mask_patch % model_patch:
        raise ValueError(
            f"task.mask_patch: {mask_patch} must divide the image ({img_size}) and be a multiple of the model's "
            f"patch ({model_patch})"
        )
    side, scale = img_size // mask_patch, mask_patch // model_patch
    mask = torch.randperm(side * side) < mask_count(side * side, ratio)
    cells = mask.view(side, 1, side, 1).expand(side, scale, side, scale)  # (h, s, w, s), h and w in mask patches
    return cells.reshape(side * scale, side * scale)

"""Random masks of masked image modelling."""

from __future__ import annotations

import math
import random

import torch


def mask_count(patches: int, ratio: float) -> int:
    """Return how many patches are hidden, rounded up as in microsoft/SimMIM (data_simmim.py). 1e-9 keeps 10 × 0.3 at
    3."""
    return math.ceil(patches * ratio - 1e-9)


class RandomMask:
    """Draws bool masks, (img_size / model_patch, img_size / model_patch), true where hidden, from the sample's stream
    (Python's random).

    All sizes are in pixels. Whole patches of mask_patch pixels are hidden. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, img_size: int, mask_patch: int, model_patch: int, ratio: float):
        if img_size % mask_patch or mask_patch % model_patch:
            raise ValueError(
                f"task.mask_patch: {mask_patch} must divide the image ({img_size}) and be a multiple of the model's "
                f"patch ({model_patch})"
            )
        side, scale = img_size // mask_patch, mask_patch // model_patch
        self.patches, self.hidden = side * side, mask_count(side * side, ratio)
        self.side, self.scale = side, scale

    def __call__(self) -> torch.Tensor:
        keys = [random.random() for _ in range(self.patches)]
        cells = bytearray(self.patches)
        for patch in sorted(range(self.patches), key=keys.__getitem__)[: self.hidden]:
            cells[patch] = 1
        return torch.frombuffer(self._enlarged(cells), dtype=torch.bool).view(2 * [self.side * self.scale])

    def _enlarged(self, cells: bytearray) -> bytearray:
        """Repeat every cell `scale` times in both directions; on bytes, as three calls to torch take longer."""
        wide = b"".join([cells[i : i + 1] * self.scale for i in range(self.patches)])
        width = self.side * self.scale
        return bytearray().join([wide[i : i + width] * self.scale for i in range(0, len(wide), width)])

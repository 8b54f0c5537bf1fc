"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), paired by position in the global batch.

timm mixes each sample with its mirror image in the local batch, which depends on the world size. Here neighbours
(positions 2k and 2k + 1) are mixed, with one coefficient per optimizer step that is drawn from (seed, step). So pairs
and coefficient are the same at any world size and accumulation.
"""

from __future__ import annotations

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam

from dsmim.data.order import stream_key
from dsmim.data.streams import seeded
from dsmim.recipe import ClassifyTask


def mix(
    images: torch.Tensor, targets: torch.Tensor, settings: ClassifyTask, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (B, C, H, W) and soft targets (B, K), each sample mixed with its neighbour.

    B and the first sample's position are even, so that every sample has its neighbour in the batch.
    """
    assert len(images) % 2 == 0
    partner = torch.arange(len(images), device=images.device) ^ 1
    with seeded(stream_key(seed, "mix", step)):
        cut = np.random.rand() < settings.mix_switch if settings.mixup and settings.cutmix else bool(settings.cutmix)
        alpha = settings.cutmix if cut else settings.mixup
        share = float(np.random.beta(alpha, alpha))
        if cut:
            (top, bottom, left, right), share = cutmix_bbox_and_lam(images.shape, share)
    if cut:
        images = images.clone()
        images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    else:
        images = images * share + images[partner] * (1 - share)
    return images, targets * share + targets[partner] * (1 - share)

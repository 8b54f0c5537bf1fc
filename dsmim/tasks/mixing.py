"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), paired by position in the global batch.

timm (timm.data.Mixup) mixes each sample with its mirror image in the local batch, and draws one coefficient for that
batch, or one per pair; both depend on the world size. Here neighbours (positions 2k and 2k + 1) are mixed, and each
run of task.mix_run neighbouring positions has its own draw, keyed by (seed, run): mixup or CutMix, coefficient, box.
So the mixed batch is the same at any world size, accumulation and micro batch. Neighbours are different images, also
with repeated augmentation (data/order.py). A run of 2 is timm's mode "pair"; a run of a GPU's batch is its mode
"batch".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from dsmim.data.order import stream_key
from dsmim.recipe import ClassifyTask

_STREAM = np.random.RandomState()
"""Seeded again for each draw: making one takes longer than the draw."""


class _Draw(NamedTuple):
    """How the pairs of one run are mixed: outside the box `keep` of the own image stays, inside it nothing does."""

    keep: float
    share: float
    """Share of the own image in all, which is the weight of its label."""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    """First row, row after the last, first column, column after the last."""


def mix(
    images: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, settings: ClassifyTask, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (B, C, H, W) and soft targets (B, K), each sample mixed with its neighbour.

    positions: (B,) successive positions, best in host memory; B is even, so that every sample has its neighbour.
    """
    assert len(images) % 2 == 0
    height, width = images.shape[-2:]
    runs = [first // settings.mix_run for first in positions[::2].tolist()]
    draws = {run: _draw(settings, seed, run, height, width) for run in dict.fromkeys(runs)}
    per_sample = [draws[run] for run in runs for _ in range(2)]
    boxes, keep, share = (torch.tensor(column).to(images.device, non_blocking=True) for column in (
        [draw.box for draw in per_sample], [draw.keep for draw in per_sample], [draw.share for draw in per_sample]
    ))  # fmt: skip
    partner = torch.arange(len(images), device=images.device) ^ 1
    own = keep.view(-1, 1, 1, 1) * ~_inside(boxes, height, width)  # (B, 1, H, W)
    return torch.lerp(images[partner], images, own), torch.lerp(targets[partner], targets, share[:, None])


def _draw(settings: ClassifyTask, seed: int, run: int, height: int, width: int) -> _Draw:
    """Return the draw of a run. NumPy promises the numbers of RandomState in every version, unlike Generator's."""
    _STREAM.seed(stream_key(seed, "mix", run) % 2**32)
    both = settings.mixup and settings.cutmix
    cut = _STREAM.random_sample() < settings.mix_switch if both else bool(settings.cutmix)
    alpha = settings.cutmix if cut else settings.mixup
    share = float(_STREAM.beta(alpha, alpha))
    if not cut:
        return _Draw(keep=share, share=share)
    box = _box(share, _STREAM.random_sample(), _STREAM.random_sample(), height, width)
    cut_off = (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
    return _Draw(keep=1.0, share=1 - cut_off, box=box)


def _box(share: float, y: float, x: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Return CutMix's box around a centre (y, x), each from 0 to 1: an area of 1 - share with the image's proportions,
    cut at its border (as in clovaai/CutMix-PyTorch and timm)."""
    side = (1 - share) ** 0.5
    return (*_span(side, y, height), *_span(side, x, width))


def _span(side: float, centre: float, pixels: int) -> tuple[int, int]:
    length, middle = int(pixels * side), int(pixels * centre)
    return max(0, middle - length // 2), min(pixels, middle + (length + 1) // 2)


def _inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return (B, 1, H, W) bool from boxes (B, 4): the pixels inside each box."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows, columns = (torch.arange(size, device=boxes.device) for size in (height, width))
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]

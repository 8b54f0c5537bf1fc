"""The random resized crop of an encoded image: which crop is drawn decides at which size a JPEG is decoded."""

from __future__ import annotations

import math
import random

import torch
from torch.nn.functional import interpolate

from dsmim.data.decode import Buffer, decode, decode_smaller, image_size, is_jpeg
from dsmim.recipe import Augment

Box = tuple[int, int, int, int]
"""top, left, height, width in pixels"""


class RandomResizedCrop:
    """Decodes, crops and resizes (antialiased) to (channels, img_size, img_size) uint8. Raises Undecodable.

    The boxes have the distribution of torchvision's RandomResizedCrop, whose own code for drawing and cropping takes a
    tenth of the time of decoding.
    """

    def __init__(self, augment: Augment, img_size: int, channels: int = 3):
        self.size, self.mode, self.channels = [img_size, img_size], augment.interpolation, channels
        self.scale, self.ratio = tuple(augment.crop_scale), tuple(augment.crop_ratio)
        self.log_ratio = [math.log(ratio) for ratio in self.ratio]
        self.scaled = augment.decode == "scaled"

    def __call__(self, data: Buffer) -> torch.Tensor:
        if self.scaled and is_jpeg(data):
            return self._scaled(data)
        image = decode(data, self.channels)
        return self._resize(image, self.box(*image.shape[-2:]))

    def box(self, height: int, width: int) -> Box:
        """Draw a box for an image: area and logarithm of the ratio uniform, in up to ten tries, then its position."""
        for _ in range(10):
            area = height * width * _uniform(*self.scale)
            ratio = math.exp(_uniform(*self.log_ratio))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(_uniform(0, height - h + 1)), int(_uniform(0, width - w + 1)), h, w
        return self._central(height, width)

    def _central(self, height: int, width: int) -> Box:
        """Return the middle of an image too elongated for any crop, at the nearest allowed ratio."""
        h, w = height, width
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w

    def _resize(self, image: torch.Tensor, box: Box) -> torch.Tensor:
        top, left, height, width = box
        crop = image[:, top : top + height, left : left + width]
        # With a separate stride for the batch dimension, torch sees that the crop is channels-last; otherwise it writes
        # channels-first, which takes a third longer (pytorch issue 68430).
        crop = crop.as_strided((1, *crop.shape), (image.numel(), *crop.stride()))
        return interpolate(crop, self.size, mode=self.mode, antialias=True)[0]

    def _scaled(self, data: Buffer) -> torch.Tensor:
        """Return the same crop, to within half a pixel, of a JPEG decoded at 1/2, 1/4 or 1/8 of its size.

        The scale is chosen so that the decoded crop has at least as many pixels as the output.
        """
        full_height, full_width = image_size(data)
        box = self.box(full_height, full_width)
        factor = min(box[2:]) // self.size[0]
        if factor < 2:
            return self._resize(decode(data, self.channels), box)
        small = decode_smaller(data, (full_height // factor, full_width // factor), self.channels)
        y, x = small.shape[1] / full_height, small.shape[2] / full_width
        top, left = round(box[0] * y), round(box[1] * x)
        bottom, right = round((box[0] + box[2]) * y), round((box[1] + box[3]) * x)
        return self._resize(small, (top, left, bottom - top, right - left))


def _uniform(low: float, high: float) -> float:
    """Draw from [low, high) by random(), the only function whose numbers Python keeps the same across versions."""
    return low + (high - low) * random.random()

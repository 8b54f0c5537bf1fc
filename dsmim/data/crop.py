"""The random crop of an encoded image: which crop is drawn decides at which size a JPEG is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import interpolate

from dsmim.data.decode import Buffer, decode, decode_smaller, image_size, is_jpeg, refuse_too_large
from dsmim.data.streams import uniform
from dsmim.recipe import Augment

Box = tuple[int, int, int, int]
"""top, left, height, width in pixels"""

PADDING = 4
"""Pixels around the image from which the Simple Random Crop takes some (facebookresearch/deit, augment.py)."""


def training_crop(augment: Augment, img_size: int, channels: int = 3) -> Callable[[Buffer], torch.Tensor]:
    """Return the crop that augment.crop names: it decodes, crops and resizes (antialiased) to (channels, img_size,
    img_size) uint8, and raises Undecodable."""
    crop = SimpleRandomCrop if augment.crop == "simple" else RandomResizedCrop
    return crop(augment, img_size, channels)


class RandomResizedCrop:
    """Crops a box of random area and ratio, and resizes it.

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
            area = height * width * uniform(*self.scale)
            ratio = math.exp(uniform(*self.log_ratio))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1)), h, w
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
        return _resized(image, box, self.size, self.mode)

    def _scaled(self, data: Buffer) -> torch.Tensor:
        """Return the same crop, to within half a pixel, of a JPEG decoded at 1/2, 1/4 or 1/8 of its size.

        The scale is chosen so that the decoded crop has at least as many pixels as the output.
        """
        full_height, full_width = image_size(data)
        box = self.box(full_height, full_width)
        small = _decoded(data, min(box[2:]) // self.size[0], self.channels)
        y, x = small.shape[1] / full_height, small.shape[2] / full_width
        top, left = round(box[0] * y), round(box[1] * x)
        bottom, right = round((box[0] + box[2]) * y), round((box[1] + box[3]) * x)
        return self._resize(small, (top, left, bottom - top, right - left))


class SimpleRandomCrop:
    """DeiT III's Simple Random Crop: the short side is resized to img_size, and a square of this side is cropped at a
    random place, which may reach 4 pixels beyond the border; these are reflected.

    It is torchvision's Resize and RandomCrop(padding=4, padding_mode="reflect").
    """

    def __init__(self, augment: Augment, img_size: int, channels: int = 3):
        self.side, self.mode, self.channels = img_size, augment.interpolation, channels
        self.scaled = augment.decode == "scaled"

    def __call__(self, data: Buffer) -> torch.Tensor:
        height, width = image_size(data)
        factor = min(height, width) // self.side if self.scaled and is_jpeg(data) else 1
        image = _decoded(data, factor, self.channels)
        # of the size in the header, except where Pillow applies a TIFF's orientation
        height, width = (height, width) if factor > 1 else image.shape[-2:]
        size = self.resized(height, width)
        return self._cropped(_resized(image, (0, 0, *image.shape[-2:]), size, self.mode), *self.corner(*size))

    def resized(self, height: int, width: int) -> list[int]:
        """Return height and width after resizing: the long side is rounded down, as in torchvision. Raises Undecodable
        when an elongated image would become larger than data.max_pixels."""
        short, long = min(height, width), max(height, width)
        long = int(self.side * long / short)
        size = [self.side, long] if height <= width else [long, self.side]
        refuse_too_large(*size, f"with its short side resized to {self.side}, ")
        return size

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Draw top and left of the square in a resized image; both may be outside."""
        return tuple(int(uniform(0, side - self.side + 2 * PADDING + 1)) - PADDING for side in (height, width))

    def _cropped(self, image: torch.Tensor, top: int, left: int) -> torch.Tensor:
        """Return the square at a corner. By NumPy, because torch pads uint8 as floats and in another layout."""
        begins, ends = (top, left), (top + self.side, left + self.side)
        inside = [slice(max(0, a), min(b, n)) for a, b, n in zip(begins, ends, image.shape[1:], strict=True)]
        missing = [(part.start - a, b - part.stop) for part, a, b in zip(inside, begins, ends, strict=True)]
        part = image[:, inside[0], inside[1]]
        if missing == [(0, 0), (0, 0)]:
            return part
        return torch.from_numpy(np.pad(part.permute(1, 2, 0), (*missing, (0, 0)), mode="reflect")).permute(2, 0, 1)


def _decoded(data: Buffer, factor: int, channels: int) -> torch.Tensor:
    """Return the image; from a factor of 2 on that of a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest that is at
    least 1/factor."""
    if factor < 2:
        return decode(data, channels)
    height, width = image_size(data)
    return decode_smaller(data, (height // factor, width // factor), channels)


def _resized(image: torch.Tensor, box: Box, size: list[int], mode: str) -> torch.Tensor:
    """Return the box of an image (C, H, W) in another size [height, width]."""
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    # With a separate stride for the batch dimension, torch sees that the crop is channels-last; otherwise it writes
    # channels-first, which takes a third longer (pytorch issue 68430).
    crop = crop.as_strided((1, *crop.shape), (image.numel(), *crop.stride()))
    return interpolate(crop, size, mode=mode, antialias=True)[0]

"""The colours of DeiT III (arXiv 2204.07118): 3-Augment and colour jitter, by Pillow as in the authors' augment.py.

Pillow gives the authors' pixels and is the fastest here: torchvision's Gaussian blur of tensors differs by up to 63 of
255, and its greyscale, contrast and saturation by 1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as TF

from dsmim.data.streams import uniform

BLUR_RADIUS = (0.1, 2.0)
"""Limits of the standard deviation of the blur, in pixels."""
SOLARIZE_FROM = 128
"""Values from here on are inverted."""

Operation = tuple[str, float]
"""Name and strength: the radius of a blur, the factor of a change, 0 for what has no strength."""

_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "greyscale": lambda image, _: image.convert("L").convert(image.mode),
    "solarize": lambda image, _: ImageOps.solarize(image, SOLARIZE_FROM),
    "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
}
_ONE_OF_THREE = ("greyscale", "solarize", "blur")
_ORDERS = tuple(permutations(("brightness", "contrast", "saturation")))


class ColourChange:
    """Applies 3-Augment, then colour jitter, to (C, H, W) uint8 with C = 3, or 1: greyscale and saturation leave grey
    images as they are.

    three: whether one of greyscale, solarisation and blur is applied; jitter: strength of the colour jitter, or 0.
    """

    def __init__(self, three: bool, jitter: float):
        self.three, self.jitter = three, jitter

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return TF.pil_to_tensor(change(TF.to_pil_image(image), self.draw()))

    def draw(self) -> list[Operation]:
        """Draw what is done to one image, from the sample's stream."""
        return [*([_one_of_three()] if self.three else []), *(_color_jitter(self.jitter) if self.jitter else [])]


def change(image: Image.Image, operations: list[Operation]) -> Image.Image:
    """Return an RGB or grey image after operations, one after another."""
    for name, strength in operations:
        image = _OPERATIONS[name](image, strength)
    return image


def _one_of_three() -> Operation:
    name = _ONE_OF_THREE[int(uniform(0, 3))]
    return name, uniform(*BLUR_RADIUS) if name == "blur" else 0.0


def _color_jitter(strength: float) -> list[Operation]:
    """Draw factors from 1 - strength (at least 0) to 1 + strength, in random order, as torchvision's ColorJitter."""
    order = _ORDERS[int(uniform(0, len(_ORDERS)))]
    return [(name, uniform(max(0.0, 1 - strength), 1 + strength)) for name in order]

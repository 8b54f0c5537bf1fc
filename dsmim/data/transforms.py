"""From an encoded image to an augmented uint8 tensor, which is normalised on the device (normalisation.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dsmim.data.crop import training_crop
from dsmim.data.decode import Buffer, decode
from dsmim.data.normalisation import IMAGENET, Normalisation
from dsmim.data.streams import fresh_key, seeded
from dsmim.data.three_augment import ColourChange
from dsmim.recipe import Augment

Transform = Callable[[Buffer], torch.Tensor]
"""An encoded image → (C, img_size, img_size) uint8. Raises Undecodable."""


def train_transform(augment: Augment, img_size: int, pixels: Normalisation = IMAGENET) -> Transform:
    """Return the training transform: crop, flips, colours (3-Augment, colour jitter or RandAugment), random erasing, on
    uint8.

    pixels: how the result will be normalised; images are decoded to its number of channels. RandAugment needs 3.
    """
    steps = [training_crop(augment, img_size, pixels.channels)]
    steps += [_RandomFlip(augment.hflip, dim=-1)] if augment.hflip else []
    steps += [_RandomFlip(augment.vflip, dim=-2)] if augment.vflip else []
    if augment.three_augment or augment.color_jitter:
        steps += [ColourChange(augment.three_augment, augment.color_jitter or 0.0)]
    steps += [_RandAugment(augment, img_size, pixels)] if augment.rand_augment else []
    steps += [_RandomErasing(augment.random_erasing, pixels)] if augment.random_erasing else []
    return _Steps(steps)


def eval_transform(augment: Augment, img_size: int, channels: int = 3) -> Transform:
    """Return the transform that decodes to so many channels and then does `eval_crop`."""
    return _Steps([partial(decode, channels=channels), eval_crop(augment, img_size)])


def eval_crop(augment: Augment, img_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return timm's evaluation transform of (C, H, W) uint8: resize the short side to img_size / eval_crop_ratio, crop
    the centre (C, img_size, img_size)."""
    short = int(img_size / augment.eval_crop_ratio)
    resize = v2.Resize(short, interpolation=_mode(augment.eval_interpolation), antialias=True)
    return _Steps([resize, v2.CenterCrop(img_size)])


def _mode(name: str) -> v2.InterpolationMode:
    return v2.InterpolationMode(name)


class _Steps:
    """Steps one after another. (v2.Compose inspects its input and refuses bytes.)"""

    def __init__(self, steps: list[Callable]):
        self.steps = steps

    def __call__(self, image: Any) -> torch.Tensor:
        for step in self.steps:
            image = step(image)
        return image


class _RandomFlip:
    def __init__(self, share: float, dim: int):
        self.share, self.dim = share, dim

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(self.dim) if random.random() < self.share else image


class _RandAugment:
    """timm's RandAugment, which works on PIL images."""

    def __init__(self, augment: Augment, img_size: int, pixels: Normalisation):
        hyper = {  # as timm's create_transform sets them
            "translate_const": int(img_size * 0.45),
            "img_mean": tuple(round(255 * mean) for mean in pixels.mean),
            "interpolation": str_to_pil_interp(augment.interpolation),
        }
        self.augment = rand_augment_transform(augment.rand_augment, hyper)
        for operation in self.augment.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        with seeded(fresh_key()):
            return TF.pil_to_tensor(self.augment(TF.to_pil_image(image)))


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as timm does. At its greatest strength timm keeps 0 bits, which is black; Pillow from 12 on refuses
    that."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


class _RandomErasing:
    """timm's RandomErasing in "pixel" mode (area 0.02 to 1/3, ratio 0.3 to 3.3, timm's 1 / 0.3), before
    normalisation.

    Normal noise with the mean and standard deviation of the normalisation is rounded to uint8 and clipped. timm, which
    erases after normalisation, does not clip: with ImageNet's figures 2 % of the noise values are affected.
    """

    def __init__(self, share: float, pixels: Normalisation):
        self.share, self.pixels = share, pixels
        self.box = v2.RandomErasing(p=1.0, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if random.random() >= self.share:
            return image
        with seeded(fresh_key()):
            return self._erase(image)

    def _erase(self, image: torch.Tensor) -> torch.Tensor:
        box = self.box.make_params([image])
        if box["v"] is None:  # no rectangle fitted in ten tries
            return image
        mean, std = (torch.tensor(v).view(-1, 1, 1) * 255 for v in (self.pixels.mean, self.pixels.std))
        noise = torch.randn(len(image), box["h"], box["w"]) * std + mean
        image = image.clone()
        image[:, box["i"] : box["i"] + box["h"], box["j"] : box["j"] + box["w"]] = noise.round().clamp(0, 255).byte()
        return image

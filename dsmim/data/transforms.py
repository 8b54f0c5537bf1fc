"""Encoded image → augmented uint8 tensor. Normalisation happens on the device."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_pil_interp
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dsmim.data.decode import Buffer, decode
from dsmim.recipe import Augment

Transform = Callable[[Buffer], torch.Tensor]
"""An encoded image → (3, img_size, img_size) uint8. Raises Undecodable."""


@contextmanager
def own_stream():
    """What draws inside from torch's CPU generator leaves the caller's stream untouched."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def reseed(key: int) -> None:
    """Begin the CPU's random stream of that key; torch.manual_seed would reseed a GPU's too, the model's."""
    torch.default_generator.manual_seed(key)


@contextmanager
def seeded(key: int):
    """Python's, NumPy's and torch's CPU generators, seeded by `key`; the caller's streams are left untouched."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with own_stream():
        random.seed(key)
        np.random.seed(key % 2**32)
        reseed(key)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def train_transform(augment: Augment, img_size: int) -> Transform:
    """Random resized crop, flips, RandAugment and random erasing, on uint8."""
    steps = [_RandomResizedCrop(augment, img_size)]
    steps += [_RandomFlip(augment.hflip, dim=-1)] if augment.hflip else []
    steps += [_RandomFlip(augment.vflip, dim=-2)] if augment.vflip else []
    steps += [_RandAugment(augment, img_size)] if augment.rand_augment else []
    steps += [_RandomErasing(augment.random_erasing)] if augment.random_erasing else []
    return _Steps(steps)


def eval_transform(augment: Augment, img_size: int) -> Transform:
    """Resize the short side to img_size / eval_crop_ratio, then crop the centre (timm's evaluation)."""
    short = int(img_size / augment.eval_crop_ratio)
    resize = v2.Resize(short, interpolation=_mode(augment.eval_interpolation), antialias=True)
    return _Steps([decode, resize, v2.CenterCrop(img_size)])


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 → float32 with ImageNet's mean and standard deviation, on the images' device."""
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1) * 255
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (images.float().contiguous() - mean) / std  # the loader's are channels-last


def _mode(name: str) -> v2.InterpolationMode:
    return v2.InterpolationMode(name)


class _Steps:
    """One after another (v2.Compose looks into its input and takes bytes for a mistake)."""

    def __init__(self, steps: list[Callable]):
        self.steps = steps

    def __call__(self, image: Any) -> torch.Tensor:
        for step in self.steps:
            image = step(image)
        return image


class _RandomResizedCrop:
    """Decodes, crops, resizes. The boxes are distributed as those of torchvision's RandomResizedCrop, whose own way of
    drawing and cropping takes a tenth of decoding's time."""

    def __init__(self, augment: Augment, img_size: int):
        self.size, self.mode = [img_size, img_size], augment.interpolation
        self.scale, self.ratio = tuple(augment.crop_scale), tuple(augment.crop_ratio)
        self.log_ratio = [math.log(ratio) for ratio in self.ratio]

    def __call__(self, data: Buffer) -> torch.Tensor:
        image = decode(data)
        top, left, height, width = self.box(*image.shape[-2:])
        crop = image[:, top : top + height, left : left + width]
        # A batch dimension with a stride of its own tells torch that the crop is channels-last; otherwise it writes
        # channels-first, which takes a third longer (pytorch issue 68430).
        crop = crop.as_strided((1, *crop.shape), (image.numel(), *crop.stride()))
        return interpolate(crop, self.size, mode=self.mode, antialias=True)[0]

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop: area and logarithm of the ratio uniform, ten tries; then the place."""
        for _ in range(10):
            a, r, y, x = torch.rand(4).tolist()  # at once: a call to torch costs as much as all the arithmetic here
            area = height * width * (self.scale[0] + a * (self.scale[1] - self.scale[0]))
            ratio = math.exp(self.log_ratio[0] + r * (self.log_ratio[1] - self.log_ratio[0]))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
        return self._central(height, width)

    def _central(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Of an image so long that no crop fits: the middle, at the nearest ratio allowed."""
        h, w = height, width
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w


class _RandomFlip:
    def __init__(self, share: float, dim: int):
        self.share, self.dim = share, dim

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(self.dim) if torch.rand(1).item() < self.share else image


class _RandAugment:
    """timm's RandAugment, which works on PIL images."""

    def __init__(self, augment: Augment, img_size: int):
        hyper = {  # as timm's create_transform sets them
            "translate_const": int(img_size * 0.45),
            "img_mean": tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN),
            "interpolation": str_to_pil_interp(augment.interpolation),
        }
        self.augment = rand_augment_transform(augment.rand_augment, hyper)
        for operation in self.augment.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        with seeded(int(torch.randint(2**62, ()))):
            return TF.pil_to_tensor(self.augment(TF.to_pil_image(image)))


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which at its greatest strength keeps no bit at all: black. Pillow below 12 did that, from 12 on it
    refuses."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


class _RandomErasing:
    """timm's RandomErasing in "pixel" mode (area 0.02 to 1/3, ratio 0.3 to 3.3), before normalisation.

    Normal noise of ImageNet's mean and deviation is rounded to uint8 and clipped, which timm, after normalisation,
    does not do: 2 % of the noise values reach the clip.
    """

    def __init__(self, share: float):
        self.share = share
        self.box = v2.RandomErasing(p=1.0, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) >= self.share:
            return image
        box = self.box.make_params([image])
        if box["v"] is None:  # no rectangle fitted in ten tries
            return image
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        noise = torch.randn(3, box["h"], box["w"]) * std + mean
        image = image.clone()
        image[:, box["i"] : box["i"] + box["h"], box["j"] : box["j"] + box["w"]] = noise.round().clamp(0, 255).byte()
        return image

"""Pixels of the evaluation against timm's own pipeline, which works on PIL images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F

from dsmim.data.transforms import eval_transform
from dsmim.recipe import Augment


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Return texture at several scales with a sharp edge."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width)
    for cells, weight in [(4, 0.5), (24, 0.3), (160, 0.2)]:
        coarse = torch.rand(1, 3, cells, cells, generator=generator)
        image += weight * F.interpolate(coarse, (height, width), mode="bicubic", antialias=True)[0]
    image[:, :, width // 3 : width // 3 + 5] = 1
    return Image.fromarray((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (384, 1.0), (192, 0.875), (160, 0.9)])
def test_resize_and_crop_are_timms(size, crop, interpolation):
    theirs = create_transform((3, size, size), crop_pct=crop, interpolation=interpolation, normalize=False)
    ours = eval_transform(Augment(eval_crop_ratio=crop, eval_interpolation=interpolation), size)
    differences = []
    for seed, (width, height) in enumerate([(500, 375), (333, 500), (640, 641), (1024, 300), (180, 150)]):
        image = photograph(width, height, seed)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        expected = theirs(image)
        expected = expected.float() * (1 if expected.dtype == torch.uint8 else 255)
        found = ours(stream.getvalue()).float()
        assert found.shape == expected.shape == (3, size, size)
        differences.append((found - expected).abs().numpy())
    everything = np.concatenate([one.ravel() for one in differences])
    assert everything.mean() < 0.02 and everything.max() <= 2.01  # of 255

"""RandAugment and random erasing against timm's own pipeline."""

import numpy as np
import pytest
import torch
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import Normalize
from torchvision.transforms.v2 import functional as TF

from dsmim.data.normalisation import IMAGENET
from dsmim.data.streams import seeded
from dsmim.data.transforms import train_transform
from dsmim.recipe import Augment

SIZE = 64


def both(name: str) -> tuple[list, list]:
    """The steps of timm's training transform and of ours."""
    theirs = create_transform(SIZE, is_training=True, auto_augment=name, interpolation="bicubic", re_prob=1.0,
                              re_mode="pixel")  # fmt: skip
    ours = train_transform(Augment(rand_augment=name, interpolation="bicubic", random_erasing=1.0), SIZE)
    return theirs.transforms, ours.steps


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m7-n3", "rand-m9-mstd101-inc1"])
def test_rand_augment_is_timm_s(name):
    """Increasing strengths (inc), their deviation (mstd), the number of operations, and the pixels."""
    theirs = next(step for step in both(name)[0] if isinstance(step, RandAugment))
    ours = both(name)[1][2].augment

    def settings(augment):
        return [(op.name, op.prob, op.magnitude, op.magnitude_std, op.magnitude_max, op.kwargs) for op in augment.ops]

    assert settings(ours) == settings(theirs) and ours.num_layers == theirs.num_layers
    assert any(op.name.endswith("Increasing") for op in ours.ops) == ("inc1" in name)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = TF.resize(TF.to_pil_image(pixels), [SIZE, SIZE])
    compared = 0
    for key in range(60):
        with seeded(key):
            mine = np.asarray(ours(image))
        try:
            with seeded(key):
                other = np.asarray(theirs(image))
        except ValueError:  # Pillow refuses the 0 bits of timm's posterize
            continue
        assert np.array_equal(mine, other)
        compared += 1
    assert compared > 50


def test_erasing_comes_last_and_is_timm_s():
    """Height and width of the rectangles: two samples of 1,500, Kolmogorov-Smirnov at 99.9 %. The noise, normalised:
    mean 0 and deviation 1, less what is clipped."""
    theirs, ours = both("rand-m9-mstd0.5-inc1")
    kinds = [type(step) for step in theirs]
    assert kinds.index(RandAugment) < kinds.index(Normalize) < kinds.index(RandomErasing) == len(kinds) - 1
    erase, erase_timm, image = ours[-1], theirs[-1], torch.full((3, SIZE, SIZE), 1, dtype=torch.uint8)
    boxes, noise = [], []
    for key in range(1500):
        with seeded(key):
            erased = erase(image)
        with seeded(key):
            other = erase_timm(torch.full((3, SIZE, SIZE), 7.0))
        boxes.append([*_extent((erased != 1).any(0)), *_extent((other != 7).any(0))])
        if key < 50:
            mask = (erased != 1).all(0)
            noise.append(IMAGENET(erased[None])[0][:, mask])
    values = torch.cat(noise, dim=1)
    assert values.mean(dim=1).abs().max() < 0.05 and (values.std(dim=1) - 0.98).abs().max() < 0.04
    for mine, other in zip(np.sort(np.array(boxes)[:, :2], 0).T, np.sort(np.array(boxes)[:, 2:], 0).T, strict=True):
        both_values = np.unique(np.concatenate([mine, other]))
        shares = [np.searchsorted(part, both_values, side="right") / 1500 for part in (mine, other)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / 1500)


def _extent(mask: torch.Tensor) -> list[int]:
    """Height and width of the rectangle in a mask."""
    return [int(mask.any(dim).sum()) for dim in (1, 0)]

"""The augmentation of DeiT III: its pixels against Pillow and torchvision, its random numbers against the papers."""

import random
import runpy
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.io import encode_png
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dsmim.data.crop import SimpleRandomCrop
from dsmim.data.decode import Undecodable, pixel_limit
from dsmim.data.normalisation import Normalisation
from dsmim.data.streams import own_stream, reseed
from dsmim.data.three_augment import ColourChange
from dsmim.data.transforms import train_transform
from dsmim.recipe import Augment
from tests.conftest import ROOT, image_bytes

DEIT = Augment(crop="simple", interpolation="bicubic", three_augment=True, color_jitter=0.3)
# What facebookresearch/deit (augment.py) calls, with the parameters that torchvision or the class there would draw
THEIRS = {
    "greyscale": lambda image, _: v2.Grayscale(3)(image),
    "solarize": lambda image, _: ImageOps.solarize(image),
    "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius=radius)),
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
}


@pytest.fixture(autouse=True)
def _own_stream():
    with own_stream():
        reseed(0)
        yield


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """An image with smooth parts, edges and noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 90 * np.sin(x / (7 + c)) * np.cos(y / 9) for c in range(channels)])
    noise = np.random.default_rng(0).integers(-30, 30, waves.shape)
    return torch.from_numpy((waves + noise + 40 * (x > width // 2)).clip(0, 255).astype(np.uint8))


def theirs(image: torch.Tensor, crop: SimpleRandomCrop, colours: ColourChange) -> Image.Image:
    """The authors' pipeline on a Pillow image, with parameters drawn in our order: crop, flip, colours."""
    pil, side = TF.to_pil_image(image), crop.side
    pil = TF.resize(pil, [side], v2.InterpolationMode.BICUBIC)
    top, left = crop.corner(pil.height, pil.width)
    pil = TF.crop(TF.pad(pil, 4, padding_mode="reflect"), top + 4, left + 4, side, side)
    pil = TF.horizontal_flip(pil) if random.random() < 0.5 else pil
    for name, strength in colours.draw():
        pil = THEIRS[name](pil, strength)
    return pil


@pytest.mark.parametrize(("shape", "allowed"), [((48, 70), 0), ((70, 48), 0), ((90, 131), 2), ((131, 90), 2)])
def test_the_pipeline_has_the_pixels_of_the_authors(shape, allowed):
    """Equal where nothing is resized. torch's bicubic resizing of uint8 differs from Pillow's by up to 2."""
    image = picture(*shape)
    data = encode_png(image).numpy().tobytes()
    transform = train_transform(DEIT, 48)
    crop, _, colours = transform.steps
    colours.jitter = 0.3 if not allowed else 0.0  # a factor would enlarge the difference
    used = Counter()
    for key in range(40):
        reseed(key)
        ours = transform(data).int()
        reseed(key)
        expected = TF.pil_to_tensor(theirs(image, crop, colours)).int()
        reseed(key)
        used.update([crop.corner(*crop.resized(*shape)), random.random() < 0.5, *(name for name, _ in colours.draw())])
        if not allowed:
            assert torch.equal(ours, expected), key
        elif not used["solarize"]:
            assert (ours - expected).abs().max() <= allowed, key
    assert {True, False, "greyscale", "solarize", "blur"} < set(used)


@pytest.mark.parametrize("corner", [(-4, -4), (-4, 26), (4, -4), (4, 26), (0, 0), (-1, 9), (3, 25)])
def test_every_reflected_border(corner):
    crop, image = SimpleRandomCrop(DEIT, 48), picture(48, 70)
    padded = TF.pad(image, 4, padding_mode="reflect")
    top, left = corner
    assert torch.equal(crop._cropped(image, *corner), padded[:, top + 4 : top + 52, left + 4 : left + 52])


def test_exactly_one_of_three_a_third_each_and_a_uniform_radius():
    draws = [ColourChange(True, 0.0).draw() for _ in range(6000)]
    assert all(len(draw) == 1 for draw in draws)
    shares = Counter(name for ((name, _),) in draws)
    assert set(shares) == {"greyscale", "solarize", "blur"}
    assert all(abs(count / 6000 - 1 / 3) < 0.025 for count in shares.values())  # four standard errors
    assert_uniform([strength for ((name, strength),) in draws if name == "blur"], 0.1, 2.0)


def test_the_jitter_is_torchvision_s():
    """Brightness, contrast and saturation once each, factors from 0.7 to 1.3, all six orders equally often; no hue."""
    draws = [ColourChange(False, 0.3).draw() for _ in range(6000)]
    for name in ("brightness", "contrast", "saturation"):
        assert_uniform([dict(draw)[name] for draw in draws], 0.7, 1.3)
    orders = Counter(tuple(name for name, _ in draw) for draw in draws)
    assert len(orders) == 6 and all(abs(count / 6000 - 1 / 6) < 0.02 for count in orders.values())
    assert_uniform([dict(ColourChange(False, 1.5).draw())["contrast"] for _ in range(2000)], 0.0, 2.5)


@pytest.mark.parametrize("shape", [(24, 32), (40, 24), (24, 24)])
def test_simple_random_crops_are_uniform(shape):
    crop = SimpleRandomCrop(DEIT, 24)
    corners = np.array([crop.corner(*shape) for _ in range(6000)])
    for values, side in zip(corners.T, shape, strict=True):
        counts = np.bincount(values + 4, minlength=side - 24 + 9)
        assert len(counts) == side - 24 + 9
        expected = 6000 / len(counts)
        chi = ((counts - expected) ** 2 / expected).sum()
        assert chi < len(counts) + 5 * np.sqrt(2 * len(counts))  # mean and deviation of chi-square


def test_areas_of_random_resized_crops_are_uniform():
    """On a square image no area up to 0.7 has to be drawn again, at any ratio from 3/4 to 4/3."""
    crop = train_transform(Augment(crop_scale=(0.08, 0.7)), 24).steps[0]
    boxes = np.array([crop.box(2000, 2000) for _ in range(4000)])
    assert_uniform(boxes[:, 2] * boxes[:, 3] / 2000**2, 0.08, 0.7)
    assert_uniform(np.log(boxes[:, 3] / boxes[:, 2]), np.log(3 / 4), np.log(4 / 3))


def assert_uniform(values, low: float, high: float) -> None:
    """Kolmogorov-Smirnov, 99.9 %."""
    ordered = np.sort(values)
    assert low <= ordered[0] and ordered[-1] <= high
    steps = np.arange(len(ordered) + 1) / len(ordered)
    shares = (ordered - low) / (high - low)
    distance = max(np.abs(shares - steps[1:]).max(), np.abs(shares - steps[:-1]).max())
    assert distance < 1.95 / np.sqrt(len(ordered))


def test_grey_images_keep_one_channel_and_are_not_changed_by_greyscale():
    image = picture(24, 24, channels=1)
    data = encode_png(image).numpy().tobytes()
    transform = train_transform(
        DEIT.model_copy(update={"color_jitter": None, "hflip": 0.0}), 24, Normalisation((0.5,), (0.5,))
    )
    crop, colours = transform.steps
    names = set()
    for key in range(20):
        reseed(key)
        ours = transform(data)
        reseed(key)
        plain, ((name, _),) = crop(data), colours.draw()
        assert ours.shape == (1, 24, 24) and torch.equal(ours, plain) == (name == "greyscale")
        names.add(name)
    assert len(names) == 3


def test_scaled_decoding_gives_almost_the_same_simple_crops():
    data = image_bytes(2, side=260, kind="JPEG")
    exact, scaled = (SimpleRandomCrop(Augment(crop="simple", decode=how), 60) for how in ("exact", "scaled"))
    for key in range(4):
        reseed(key)
        one = exact(data).int()
        reseed(key)
        other = scaled(data).int()
        assert one.shape == other.shape == (3, 60, 60) and 0 < (one - other).abs().float().mean() < 8
    assert torch.equal(
        _at(exact, image_bytes(2, side=100, kind="JPEG")), _at(scaled, image_bytes(2, side=100, kind="JPEG"))
    )


def _at(crop, data: bytes) -> torch.Tensor:
    reseed(7)
    return crop(data)


def test_an_elongated_image_is_not_blown_up():
    """Its short side of 1 pixel would become 24, and the long one 24 times as long."""
    data = encode_png(torch.zeros(3, 1, 900, dtype=torch.uint8)).numpy().tobytes()
    crop = SimpleRandomCrop(DEIT, 24)
    assert crop(data).shape == (3, 24, 24)
    with pixel_limit(100_000), pytest.raises(Undecodable, match="resized to 24, 21600 × 24 pixels; more than 100000"):
        crop(data)


def test_the_command_that_draws_the_pictures_of_the_documentation(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(image_bytes(3, side=150, kind="JPEG"))
    draw = runpy.run_path(str(ROOT / "examples/augmentations.py"))["main"]
    draw(str(tmp_path / "photo.jpg"), str(tmp_path / "out"))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (ROOT / "docs/images").glob("augment_*.jpg")}
    page = (ROOT / "docs/augmentation.md").read_text()
    assert all(f"(images/{name})" in page for name in names)

"""The transform of dsmim.load: what it takes as an image, and what it refuses."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dsmim.library import EvalTransform
from dsmim.recipe import Augment
from tests.conftest import image_bytes


@pytest.fixture
def transform():
    return EvalTransform(64, Augment())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_one_image_in_every_form(transform, tmp_path, kind):
    data = image_bytes(3, side=90, kind=kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    wanted = transform(data)
    assert wanted.shape == (3, 64, 64) and wanted.dtype == torch.float32
    for form in (bytearray(data), memoryview(data), path, str(path)):
        assert torch.equal(transform(form), wanted)
    # Pillow decodes JPEG and WebP by a library of its own.
    forms = [Image.open(path), pixels, pixels.contiguous()]
    assert all(torch.equal(transform(form), transform(forms[0])) for form in forms)
    assert torch.allclose(transform(forms[0]), wanted, atol=0 if kind == "PNG" else 0.05)


def test_grey_images(transform):
    grey = Image.open(io.BytesIO(image_bytes(3))).convert("L")
    pixels = torch.from_numpy(np.array(grey))[None]
    assert torch.equal(transform(grey), transform(pixels))
    assert torch.equal(transform(grey), transform(grey.convert("RGB")))


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8).byte(), 7, None]
)
def test_what_is_no_image(transform, image):
    with pytest.raises(ValueError, match="an image is"):
        transform(image)


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (5, 0)), Image.new("I;16", (5, 0)), *(torch.zeros(c, 0, 5, dtype=torch.uint8) for c in (1, 3))],
    ids=["PIL RGB", "PIL I;16", "tensor (1, 0, 5)", "tensor (3, 0, 5)"],
)
def test_images_without_pixels(transform, image):
    with pytest.raises(ValueError, match=r"at least one pixel high and wide, not 0 × 5 \(height × width\)"):
        transform(image)


def test_image_files_that_cannot_be_read(transform, tmp_path):
    (tmp_path / "image.png").write_bytes(b"rubbish")
    for name, said in (("image.png", "cannot be decoded: no known image format"), ("none.png", "No such file")):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            transform(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes(image_bytes(3, side=200, kind="JPEG")[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be decoded: image file is truncated"):
        transform(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(tmp_path, channels):
    """Grey and RGBA networks: every form of one image, its channels and the shapes that a tensor may have."""
    transform = EvalTransform(64, Augment(), mean=(0.4,) * channels, std=(0.2,) * channels)
    mode = {1: "L", 4: "RGBA"}[channels]
    data = image_bytes(3, side=90)
    pillow = Image.open(io.BytesIO(data)).convert(mode)
    pixels = torch.from_numpy(np.array(pillow)).view(90, -1, channels).permute(2, 0, 1)
    wanted = transform(data)
    assert wanted.shape == (channels, 64, 64)
    assert all(torch.equal(transform(form), wanted) for form in (pillow, pixels, Image.open(io.BytesIO(data))))
    values = wanted * 0.2 + 0.4
    assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6
    if channels == 4:
        assert torch.allclose(values[3], torch.ones(64, 64))  # opaque
    for shape in {1: [(3, 8, 8), (4, 8, 8)], 4: [(3, 8, 8), (1, 8, 8)]}[channels]:
        with pytest.raises(ValueError, match=rf"an image is a uint8 tensor \({channels}, H, W\) of values 0 to 255"):
            transform(torch.zeros(shape, dtype=torch.uint8))

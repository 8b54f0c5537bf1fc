"""The decoder: what a run's pixels depend on, and images of one and of four channels."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dsmim.data import decode as module
from dsmim.data.decode import MODES, Undecodable, decode, decode_pillow, decoder_name
from dsmim.data.normalisation import Normalisation
from dsmim.data.transforms import eval_transform, train_transform
from dsmim.recipe import Augment
from tests.conftest import image_bytes, run
from tests.data.test_damage import IMAGES, encoded, photo

KINDS = ["JPEG", "PNG", "WEBP", "TIFF"]


def rotated(kind: str, orientation: int = 6) -> bytes:
    """An image of 48 × 40 pixels with an EXIF orientation; 6: to be turned by 90 degrees, to 40 × 48."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_exif_orientation_turns_no_image(kind, channels):
    """The rule of docs/data.md: as torchvision's ImageFolder, with which the published models were trained."""
    data = rotated(kind)
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x0112] == 6
    assert decode(data, channels).shape == (channels, 40, 48)
    assert torch.equal(decode(data, channels), decode(rotated(kind, 1), channels))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_orientation_of_a_tiff_is_applied(channels):
    """It is a part of the format, no EXIF; Pillow has always turned these."""
    upright = decode(rotated("TIFF", 1), channels)
    assert upright.shape == (channels, 40, 48)
    assert torch.equal(decode(rotated("TIFF"), channels), torch.rot90(upright, -1, (1, 2)))


def test_the_decoder_s_name_holds_its_pixels(monkeypatch):
    """A fixed value: another decoder, or another rounding of this one, changes the pixels of every run."""
    assert decoder_name() == "torchvision and Pillow, EXIF orientation not applied, 58ec4138"
    right = module.decode_image
    try:
        for changed in (
            lambda data, mode, apply_exif_orientation: right(data, mode, apply_exif_orientation=True),
            lambda data, mode, apply_exif_orientation: right(data, mode) ^ 1,
        ):
            monkeypatch.setattr(module, "decode_image", changed)
            decoder_name.cache_clear()
            assert not decoder_name().endswith("58ec4138")
    finally:
        monkeypatch.undo()
        decoder_name.cache_clear()


def test_a_torchvision_without_a_decoder_is_an_error_not_a_damaged_image(monkeypatch):
    monkeypatch.setattr(module, "decode_image", None)
    decoder_name.cache_clear()
    for action in (decoder_name, lambda: decode(image_bytes(1, kind="JPEG"))):
        with pytest.raises(ValueError, match=r"no longer decodes images .*install an older one") as caught:
            action()
        assert not isinstance(caught.value, Undecodable)


def test_only_torchvision_s_own_warning_is_silenced():
    """In a process of its own: pytest has filters of its own. Without ours, -W error would stop at the first image."""
    code = (
        "import sys, warnings; from dsmim.data.decode import decode; print(decode(sys.stdin.buffer.read()).shape)\n"
        "try: warnings.warn('another', DeprecationWarning)\nexcept DeprecationWarning: print('raised')"
    )
    done = run(
        "python",
        "-W",
        "error::DeprecationWarning:__main__",
        "-W",
        "error:The image decoding",
        "-c",
        f"import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO({image_bytes(1, kind='JPEG')!r})); " + code,
    )
    assert done.stdout.splitlines() == ["torch.Size([3, 40, 41])", "raised"]
    with warnings.catch_warnings():  # the message is still what torchvision says, where it says anything
        warnings.simplefilter("error")
        try:
            module.decode_image(module._tensor(image_bytes(1, kind="JPEG")))
        except DeprecationWarning as warning:
            assert str(warning).startswith("The image decoding and encoding capabilities of TorchVision are deprecated")


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_images_are_as_pillow_converts_them(name, channels):
    """A grey JPEG is what the file stores; Pillow computes it from RGB, which was rounded and limited to 0 to 255."""
    with Image.open(io.BytesIO(IMAGES[name])) as image:
        reference = torch.from_numpy(np.array(image.convert(MODES[channels]))).view(40, 48, channels).permute(2, 0, 1)
    found = decode(IMAGES[name], channels)
    assert found.dtype == torch.uint8 and found.shape == (channels, 40, 48) and found.stride(0) == 1
    assert (found.int() - reference.int()).abs().max() <= 1


def test_a_grey_jpeg_in_colour_is_its_luma():
    data = encoded(photo(), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", image.size)
        luma = np.array(image)
    assert np.array_equal(decode(data, 1)[0].numpy(), luma)


def test_sixteen_bits_in_one_channel_are_scaled():
    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    image = decode(encoded(Image.fromarray(ramp), "PNG"), 1)
    assert image.shape == (1, 40, 40) and np.abs(image[0].numpy().astype(int) - ramp // 257).max() <= 1


def test_what_has_no_alpha_is_opaque():
    for kind in KINDS:
        assert decode(encoded(photo(), kind), 4)[3].unique().tolist() == [255]
    clear = photo("RGBA")
    clear.putalpha(7)
    assert decode(encoded(clear, "PNG"), 4)[3].unique().tolist() == [7]
    assert torch.equal(decode(encoded(clear, "PNG"), 4), decode_pillow(clear, 4))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("decoding", ["exact", "scaled"])
def test_transforms_keep_the_channels(channels, decoding):
    pixels = Normalisation((0.5,) * channels, (0.5,) * channels)
    augment = Augment(decode=decoding, vflip=0.5, random_erasing=1.0)
    for kind in KINDS:
        data = encoded(photo().resize((200, 150)), kind)
        assert train_transform(augment, 24, pixels)(data).shape == (channels, 24, 24)
        assert eval_transform(augment, 24, channels)(data).shape == (channels, 24, 24)


def test_a_grey_crop_is_the_crop_of_the_grey_image():
    """Same random stream, same box: exactly a channel of what a grey image gives as RGB."""
    from dsmim.data.streams import seeded

    grey = encoded(photo("L").resize((90, 70)), "JPEG")
    one, three = train_transform(Augment(), 24, Normalisation((0.5,), (0.5,))), train_transform(Augment(), 24)
    for key in range(5):
        with seeded(key):
            first = one(grey)
        with seeded(key):
            second = three(grey)
        assert torch.equal(first.expand(3, -1, -1), second)

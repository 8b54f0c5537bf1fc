"""From encoded images to uint8 tensors: the only place where dsmim decodes an image for a network."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as TF

from dsmim.recipe.data import MAX_PIXELS
from dsmim.shards.pixels import converted, open_as

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # _by_torchvision says so when an image is to be decoded
    decode_image = None

# torchvision 0.29 deprecates this decoder in favour of torchcodec's, which turns images by their EXIF orientation: runs
# so far had other pixels. Until torchvision removes it, its warning says nothing that a user could act on.
warnings.filterwarnings(
    "ignore", "The image decoding and encoding capabilities of TorchVision are deprecated", DeprecationWarning
)

Buffer = bytes | bytearray | memoryview
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels of the tensor → Pillow's mode."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# ITU T.81, table B.1: the markers of a frame header; C4, C8 and CC mean other things.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


_limit = MAX_PIXELS


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Allow images of so many pixels within the block, in this process. Pillow's own limit is set too."""
    global _limit
    before = _limit, Image.MAX_IMAGE_PIXELS
    _limit = Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        _limit, Image.MAX_IMAGE_PIXELS = before


class Undecodable(ValueError):
    """The bytes are no image that one of the two decoders reads."""


def decode(data: Buffer, channels: int = 3) -> torch.Tensor:
    """Decode an image to (channels, H, W) uint8, channels-last in memory. channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    torchvision decodes JPEG and WebP; Pillow decodes all else, and what torchvision refuses. (torchvision's PNG decoder
    crashes the process on a damaged file, and its GIF decoder decodes every frame.) The bytes decide the format, not
    the name. 16-bit images are scaled to 8 bits; an animation gives its first frame; a palette is looked up as Pillow
    does; alpha is dropped, and with 4 channels it is 255 where an image has none; grey is the luma of ITU-R BT.601,
    which a JPEG stores. An EXIF orientation is not applied, as in torchvision's ImageFolder, with which the published
    models were trained; the tag Orientation of a TIFF, a part of the format, is applied by Pillow. Raises Undecodable
    with the decoder's message, and for too many pixels; and ValueError when torchvision has no decoder any more.
    """
    image_size(data)
    if not _fast(data, channels):
        return _by_pillow(data, channels)
    image = _by_torchvision(data, channels)
    if image is None:
        return _by_pillow(data, channels)
    return image[0] if image.ndim == 4 else image


def decode_smaller(data: Buffer, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its height and width, the smallest that is not below `size` (height, width).

    libjpeg computes fewer coefficients for it. Otherwise as `decode`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L" if channels == 1 else "RGB", size[::-1])
            return TF.pil_to_tensor(image.convert(MODES[channels]))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise Undecodable(str(error)) from None


@cache
def decoder_name() -> str:
    """Return which decoder reads the images, and a digest of what it makes of two small ones.

    A run must not change it: a decoder that rounds differently, or that turns images by their EXIF orientation, gives
    other pixels. Raises ValueError when torchvision has no decoder any more.
    """
    _check_torchvision()
    pixels = b"".join(decode(base64.b85decode(image)).numpy().tobytes() for image in _PROBES)
    return f"torchvision and Pillow, EXIF orientation not applied, {zlib.crc32(pixels):08x}"


def image_size(data: Buffer) -> tuple[int, int]:
    """Return (height, width) from the header. Raises Undecodable when there is none, and for too many pixels.

    The headers of JPEG and PNG are read here, because opening a file with Pillow takes a fiftieth of the time of
    decoding it.
    """
    size = None
    if is_jpeg(data):
        size = _jpeg_size(data)
    elif data[:8] == _PNG and len(data) >= 24:
        size = struct.unpack_from(">II", data, 16)[::-1]
    height, width = size or _size_by_pillow(data)
    if not height or not width:
        raise Undecodable(f"{width} × {height} pixels")
    refuse_too_large(height, width)
    return height, width


def refuse_too_large(height: int, width: int, how: str = "") -> None:
    """Raise Undecodable for more pixels than the limit; `how` begins the message."""
    if width * height > _limit:
        raise Undecodable(
            f"{how}{width} × {height} pixels; more than {_limit} count as a decompression bomb (data.max_pixels)"
        )


def is_jpeg(data: Buffer) -> bool:
    """Return whether the bytes begin as a JPEG does."""
    return data[:3] == _JPEG


def _jpeg_size(data: Buffer) -> tuple[int, int] | None:
    """Read the size from the first frame header, after skipping the segments before it by their lengths."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            return struct.unpack_from(">HH", data, place + 5)
        place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, place + 2)[0]
    return None


def _size_by_pillow(data: Buffer) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except UnidentifiedImageError:  # its own message contains an address in memory
        raise Undecodable("no known image format" if len(data) else "it is empty") from None
    except Exception as error:  # Pillow's plug-ins may raise anything for damaged files
        raise Undecodable(str(error)) from None


def _fast(data: Buffer, channels: int) -> bool:
    """Return whether torchvision decodes this format to so many channels."""
    return (is_jpeg(data) and channels in (1, 3)) or (bytes(data[8:12]) == b"WEBP" and channels == 3)


def _by_torchvision(data: Buffer, channels: int) -> torch.Tensor | None:
    """Return the image, (1, C, H, W) for an animation; None if torchvision cannot decode it."""
    _check_torchvision()
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        return decode_image(_tensor(data), mode, apply_exif_orientation=False)
    except (RuntimeError, ValueError):
        return None


def _check_torchvision() -> None:
    if decode_image is None:
        raise ValueError(
            f"torchvision {torchvision.__version__} no longer decodes images (it has no torchvision.io.decode_image), "
            "and other decoders give other pixels; install an older one, such as torchvision 0.29"
        )


def _by_pillow(data: Buffer, channels: int) -> torch.Tensor:
    try:
        return TF.pil_to_tensor(open_as(data, MODES[channels]))
    except Exception as error:  # as above
        raise Undecodable(str(error)) from None


def decode_pillow(image: Image.Image, channels: int = 3) -> torch.Tensor:
    """Return an image that Pillow has opened as `decode` does: (channels, H, W) uint8. Raises Undecodable when its file
    is damaged."""
    try:
        return TF.pil_to_tensor(converted(image, MODES[channels]))
    except Exception as error:  # an opened file is decoded here; Pillow's plug-ins may raise anything
        raise Undecodable(f"{getattr(image, 'filename', '') or 'an image'}: cannot be decoded: {error}") from None


def _tensor(data: Buffer) -> torch.Tensor:
    """Return the bytes as a tensor; writable bytes are not copied."""
    writable = isinstance(data, bytearray) or (isinstance(data, memoryview) and not data.readonly)
    return torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)


_PROBES = (
    "|JeWF01!$>Nk#wx0RR9200961|KR{4MR;ju002!*04e|g00;m90TKWM0000100sa600000|JwjV00smF1_cBL1_cHO2L=cV5DE$j2?`Vr4-60&"
    "6c`v66c!d59VH(c8zUSR79cDjBPJ&)Dk&KsEif%8FeNA{DF534LjeZ|2MP!Z6AB6wC>j<TC@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>"
    "C@3f>C@3f>C@3f>C@3f>C@BBH01*fP3jh-X0U`hb5di}c0sq7R7XSbQ0RR910000000000000051_%Gd03;9q0RsaA1Oos70000000002009F8"
    "1qKHZF%lCLAtO;?|HJ?m0RaI400000000000000000smF|HJ?v5dZ-M0s;d70000000000009630|W&T1~C#MQUBTi3<CiG0ucid06ze;wFEfR"
    "6oDfi?4xS$l+k1*T~8p%KKu6B{iZnymyCYjg^Xh|8R`c~6S(zo>mse!-K_Yn`@N%nNZuzY9#qLA;sLE2Xx~Tb-h)!^!Ys{gH)i}ocLXu^L*pJk"
    "kcXS@-%4Z1Y=!^X",
    "Qb|Tei~s-tS4BclR!}$~fB*mhPy_&-0V)#!3jjW~N}ft5BqE`(2ms&~iEIF!GK6p*-~c^7s5o~A|7Jh{&ERi*#E%>y*gRyPG>0I9t>a<BGk}#2"
    "$w+_FP^-gaDwf%Ipl+b%yot;&{(b$ixAUyXFJAeC;3tJa+)xN|9focJL(@DK{it-FDEO}Y-t(XU",
)
"""A JPEG with halved colour and an EXIF orientation, and a lossy WebP, of 19 × 11 pixels."""

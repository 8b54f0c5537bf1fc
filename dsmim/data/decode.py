"""From encoded images to uint8 tensors."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

from dsmim.recipe.data import MAX_PIXELS
from dsmim.shards.pixels import open_rgb

Buffer = bytes | bytearray | memoryview

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


def decode(data: Buffer) -> torch.Tensor:
    """Decode an image to (3, H, W) uint8 RGB, channels-last in memory.

    torchvision decodes JPEG and WebP; Pillow decodes all else, and what torchvision refuses. (torchvision's PNG decoder
    crashes the process on a damaged file, and its GIF decoder decodes every frame.) The bytes decide the format, not
    the name. 16-bit images are scaled to 8 bits; an animation gives its first frame; alpha is dropped and a palette is
    looked up as Pillow does; an EXIF orientation is not applied, as in torchvision's ImageFolder, with which the
    published models were trained. Raises Undecodable with the decoder's message, and for too many pixels.
    """
    image_size(data)
    if not (is_jpeg(data) or bytes(data[8:12]) == b"WEBP"):
        return _by_pillow(data)
    try:
        image = decode_image(_tensor(data), ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        return _by_pillow(data)
    return image[0] if image.ndim == 4 else image


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
    if width * height > _limit:
        raise Undecodable(
            f"{width} × {height} pixels; more than {_limit} count as a decompression bomb (data.max_pixels)"
        )
    return height, width


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


def _by_pillow(data: Buffer) -> torch.Tensor:
    try:
        return TF.pil_to_tensor(open_rgb(data))
    except Exception as error:  # as above
        raise Undecodable(str(error)) from None


def _tensor(data: Buffer) -> torch.Tensor:
    """Return the bytes as a tensor; writable bytes are not copied."""
    writable = isinstance(data, bytearray) or (isinstance(data, memoryview) and not data.readonly)
    return torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)

"""Encoded images → uint8 tensors."""

from __future__ import annotations

import io
import struct

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

from dsmim.shards.pixels import open_rgb

MAX_PIXELS = 89_478_485
"""Above it an image counts as a decompression bomb: Pillow's limit, 256 MiB as RGB. A few kilobytes may claim more."""
Buffer = bytes | bytearray | memoryview

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# ITU T.81, table B.1: the markers of a frame header; C4, C8 and CC mean other things.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Undecodable(ValueError):
    """The bytes are no image that either decoder reads."""


def decode(data: Buffer) -> torch.Tensor:
    """(3, H, W) uint8 RGB, in channels-last memory: JPEG and WebP by torchvision, all else, and what it refuses, by
    Pillow. (torchvision's PNG decoder brings the process down on a damaged file, its GIF decoder decodes every frame.)

    The bytes tell the format, not the name. 16-bit images are scaled to 8; of an animation the first frame is taken;
    alpha is dropped and a palette looked up, as Pillow does it; an EXIF orientation is not applied, as in torchvision's
    ImageFolder, through which the published models were trained. Raises Undecodable with what the decoder said, and for
    more than MAX_PIXELS.
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
    """(height, width) as the header tells. Raises Undecodable when there is none, and for more than MAX_PIXELS.

    JPEG and PNG are read here, because Pillow takes a fiftieth of decoding's time to open one.
    """
    size = None
    if is_jpeg(data):
        size = _jpeg_size(data)
    elif data[:8] == _PNG and len(data) >= 24:
        size = struct.unpack_from(">II", data, 16)[::-1]
    height, width = size or _size_by_pillow(data)
    if not height or not width:
        raise Undecodable(f"{width} × {height} pixels")
    if width * height > MAX_PIXELS:
        raise Undecodable(f"{width} × {height} pixels; more than {MAX_PIXELS} are taken for a decompression bomb")
    return height, width


def is_jpeg(data: Buffer) -> bool:
    return data[:3] == _JPEG


def _jpeg_size(data: Buffer) -> tuple[int, int] | None:
    """From the first frame header; the segments before it are skipped by their lengths."""
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
    except UnidentifiedImageError:  # its own words hold an address in memory
        raise Undecodable("no known image format" if len(data) else "it is empty") from None
    except Exception as error:  # Pillow's plug-ins raise what they like on rubbish
        raise Undecodable(str(error)) from None


def _by_pillow(data: Buffer) -> torch.Tensor:
    try:
        return TF.pil_to_tensor(open_rgb(data))
    except Exception as error:  # as above
        raise Undecodable(str(error)) from None


def _tensor(data: Buffer) -> torch.Tensor:
    """The bytes as a tensor; those that can be written to are not copied."""
    writable = isinstance(data, bytearray) or (isinstance(data, memoryview) and not data.readonly)
    return torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)

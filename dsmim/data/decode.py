"""Encoded images → uint8 tensors."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

from dsmim.data.pixels import open_rgb

MAX_PIXELS = 89_478_485
"""Above it an image counts as a decompression bomb: Pillow's limit, 256 MiB as RGB. A few kilobytes may claim more."""


class Undecodable(ValueError):
    """The bytes are no image that either decoder reads."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the header tells. Raises Undecodable for no image, and for a decompression bomb."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception as error:  # Pillow's plug-ins raise what they like on rubbish
        raise Undecodable("it is empty" if not data else str(error)) from None
    if width * height > MAX_PIXELS:
        raise Undecodable(f"{width} × {height} pixels; more than {MAX_PIXELS} are taken for a decompression bomb")
    return height, width


def decode(data: bytes) -> torch.Tensor:
    """(3, H, W) uint8 RGB. torchvision's decoders first; Pillow for what they do not know (BMP, TIFF, CMYK).

    The bytes tell the format, not the name. 16-bit images are scaled to 8; of an animation the first frame is taken;
    alpha is dropped and a palette looked up, as Pillow does it; an EXIF orientation is not applied, as in torchvision's
    ImageFolder, through which the published models were trained. Raises Undecodable with what both decoders said.
    """
    image_size(data)
    try:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as first:
        try:
            return TF.pil_to_tensor(open_rgb(data))
        except Exception as second:
            raise Undecodable(f"{str(first).splitlines()[0]} | {second}") from None
    image = image[0] if image.ndim == 4 else image
    return image if image.dtype == torch.uint8 else (image.int() // 257).byte()

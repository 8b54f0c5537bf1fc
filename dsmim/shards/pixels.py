"""Images of any format that Pillow opens, as 8-bit RGB, grey or RGBA."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def open_rgb(data: bytes) -> Image.Image:
    """Return the first frame of an encoded image in mode RGB. Raises what Pillow raises for bytes that are no image."""
    return open_as(data, "RGB")


def open_as(data: bytes, mode: str) -> Image.Image:
    """Return the first frame of an encoded image in a mode of 8 bits per channel. Raises as open_rgb."""
    with Image.open(io.BytesIO(data)) as image:
        return converted(image, mode)


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Convert to a mode. 16-bit grey values are scaled to 8 bits; Pillow's own conversion clips them to 255."""
    if image.mode.startswith("I"):  # I;16 and its variants, and I: 16-bit files may open as 32-bit integers
        values = (np.asarray(image).astype(np.int64) // 257).clip(0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert(mode)
    return image.convert(mode)

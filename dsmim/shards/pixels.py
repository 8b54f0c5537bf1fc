"""Images of any format that Pillow opens, as 8-bit RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def open_rgb(data: bytes) -> Image.Image:
    """Return the first frame of an encoded image in mode RGB. Raises what Pillow raises for bytes that are no image."""
    with Image.open(io.BytesIO(data)) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB. 16-bit grey values are scaled to 8 bits; Pillow's own conversion clips them to 255."""
    if image.mode.startswith("I"):  # I;16 and its variants, and I: 16-bit files may open as 32-bit integers
        values = (np.asarray(image).astype(np.int64) // 257).clip(0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")

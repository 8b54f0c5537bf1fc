"""Any image that Pillow opens, as 8-bit RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def open_rgb(data: bytes) -> Image.Image:
    """The first frame, in mode RGB. Raises what Pillow raises for bytes that are no image."""
    with Image.open(io.BytesIO(data)) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB. Pillow's own conversion clips 16-bit grey to 255; here it is scaled."""
    if image.mode.startswith("I"):  # I;16 and kin, and the 32-bit integers that 16-bit files may open as
        values = (np.asarray(image).astype(np.int64) // 257).clip(0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")

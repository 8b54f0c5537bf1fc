"""Images of any format that Pillow opens, as 8-bit RGB, grey or RGBA."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image


class TooManyPixels(ValueError):
    """An image has more pixels than are allowed."""


@contextmanager
def pillow_limit(pixels: int) -> Iterator[None]:
    """Allow Pillow images of so many pixels within the block, in this process. Raises TooManyPixels for a larger one,
    where Pillow by itself prints a warning, and an error from twice as many on."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        found = re.search(r"\d+", str(error))  # Image size (N pixels) exceeds limit of …
        raise TooManyPixels(f"{found[0] if found else 'its'} pixels are more than {pixels}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


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

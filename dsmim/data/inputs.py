"""An image in any form that Python users have, as `decode` gives it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dsmim.data.decode import Buffer, Undecodable, decode, decode_pillow


def pixels_of(image: Buffer | str | Path | Image.Image | torch.Tensor, channels: int = 3) -> torch.Tensor:
    """Return (channels, H, W) uint8 in channels-last memory, as `decode` does.

    Takes encoded bytes, the path of an image file, a PIL image, or a uint8 tensor (channels, H, W); (1, H, W) too for 3
    channels. Raises ValueError for anything else, for an image without pixels, and for what no decoder reads.
    """
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width)
        return decode_pillow(image, channels)
    if isinstance(image, torch.Tensor):
        return _of_tensor(image, channels)
    if isinstance(image, Buffer):
        return decode(image, channels)
    if not isinstance(image, (str, Path)):
        raise ValueError(f"an image is bytes, a path, a PIL image or a uint8 tensor (C, H, W), not {type(image)}")
    try:
        return decode(Path(image).read_bytes(), channels)
    except OSError as error:
        raise ValueError(f"{image}: cannot be read ({error.strerror})") from None
    except Undecodable as error:
        raise Undecodable(f"{image}: cannot be decoded: {error}") from None


def _of_tensor(image: torch.Tensor, channels: int) -> torch.Tensor:
    taken = (1, 3) if channels == 3 else (channels,)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) not in taken:
        shapes = " or ".join(f"({count}, H, W)" for count in sorted(taken, reverse=True))
        alpha = ", and the alpha channel" if channels == 3 else ""
        raise ValueError(
            f"an image is a uint8 tensor {shapes} of values 0 to 255, not {image.dtype} {tuple(image.shape)}; leave "
            f"out normalisation{alpha}"
        )
    _check_size(*image.shape[1:])
    return image.expand(channels, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _check_size(height: int, width: int) -> None:
    if not height or not width:
        raise ValueError(f"an image is at least one pixel high and wide, not {height} × {width} (height × width)")

"""What the channels of the input (model.in_chans) ask of the section `data`."""

from __future__ import annotations

from collections.abc import Iterator

from dsmim.recipe.data import Augment, Data


def pixel_problems(channels: int, data: Data) -> list[str]:
    """Return what does not fit images of so many channels, one line each."""
    found = [_length(channels, name, getattr(data, name)) for name in ("mean", "std")]
    found += [*_alone(channels, data), *_colours(channels, data.augment)]
    return [problem for problem in found if problem]


def _alone(channels: int, data: Data) -> Iterator[str]:
    """Yield a mean without its standard deviation, or the reverse: figures of two sources do not belong together.
    (Without a default, `_length` asks for both.)"""
    for name, other in (("mean", "std"), ("std", "mean")):
        if getattr(data, name) is not None and getattr(data, other) is None and channels in (1, 3):
            yield f"data.{name}: given without data.{other}; give both, or neither for the network's own"


def _length(channels: int, name: str, given: list[float] | None) -> str | None:
    if given is None and channels not in (1, 3):
        return f"data.{name}: has no default for model.in_chans={channels}; give {channels} numbers, or one for all"
    if given is not None and len(given) not in (1, channels):
        return f"data.{name}: has {len(given)} numbers; give model.in_chans={channels}, or one for all channels"
    return None


def _colours(channels: int, augment: Augment) -> Iterator[str]:
    """Yield augmentations that these channels do not allow. RandAugment, as timm has it, changes colours and mixes
    channels. The others work on RGB and grey; Pillow does not solarise RGBA, and alpha has no contrast."""
    if augment.rand_augment is not None and channels != 3:
        yield f"data.augment.rand_augment: works on RGB only, not with model.in_chans={channels}; set it to null"
    for key, off in (("three_augment", "false"), ("color_jitter", "null")):
        if getattr(augment, key) and channels not in (1, 3):
            yield f"data.augment.{key}: works on RGB and grey, not with model.in_chans={channels}; set it to {off}"

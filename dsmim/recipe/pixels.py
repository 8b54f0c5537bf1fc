"""What the channels of the input (model.in_chans) ask of the section `data`."""

from __future__ import annotations

from dsmim.recipe.data import Augment, Data


def pixel_problems(channels: int, data: Data) -> list[str]:
    """Return what does not fit images of so many channels, one line each."""
    found = [_length(channels, name, getattr(data, name)) for name in ("mean", "std")]
    return [problem for problem in [*found, _colours(channels, data.augment)] if problem]


def _length(channels: int, name: str, given: list[float] | None) -> str | None:
    if given is None and channels not in (1, 3):
        return f"data.{name}: has no default for model.in_chans={channels}; give {channels} numbers, or one for all"
    if given is not None and len(given) not in (1, channels):
        return f"data.{name}: has {len(given)} numbers; give model.in_chans={channels}, or one for all channels"
    return None


def _colours(channels: int, augment: Augment) -> str | None:
    """RandAugment, as timm has it, changes colours and mixes channels."""
    if augment.rand_augment is None or channels == 3:
        return None
    return f"data.augment.rand_augment: works on RGB only, not with model.in_chans={channels}; set it to null"

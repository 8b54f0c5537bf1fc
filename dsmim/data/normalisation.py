"""How pixels become the network's input: minus a mean, divided by a standard deviation, per channel.

A recipe may leave both out. Then a run that is resumed keeps its own, and a new run takes those of timm's configuration
for timm:NAME, and ImageNet's for dsmim's networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dsmim.models.foreign import PREFIX
from dsmim.recipe import Data, Model, Recipe

Channels = tuple[float, ...]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, of pixels from 0 to 1."""

    mean: Channels
    std: Channels

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, H, W) uint8 to float32 on the images' device."""
        mean, std = self._scaled(images.device)
        return (images.float().contiguous() - mean) / std  # the loader's images are channels-last

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Return the uint8 pixels (B, C, H, W) of normalised images: rounded, and limited to 0 to 255."""
        mean, std = self._scaled(images.device)
        return (images.float() * std + mean).round().clamp(0, 255).byte()

    def _scaled(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of pixels from 0 to 255, (1, C, 1, 1) each."""
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std))
        return mean, std

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean} and standard deviation {std}"

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return len(self.mean)


IMAGENET = Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def normalisation(recipe: Recipe) -> Normalisation:
    """Return the normalisation of a recipe's images."""
    return chosen_or_default(recipe.model, recipe.data)


def settled(recipe: Recipe, run: Recipe | None = None) -> Recipe:
    """Return the recipe with data.mean and data.std as one number per channel.

    What it leaves out is taken from `run`, the recipe of the run that it resumes, else the network's default.
    """
    same = [run.data] if run is not None and run.model.in_chans == recipe.model.in_chans else []
    found = chosen_or_default(recipe.model, recipe.data, *same)
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"mean": list(found.mean), "std": list(found.std)})}
    )


def chosen_or_default(model: Model, *chosen: Data) -> Normalisation:
    """Return the mean and the deviation of the first section `data` that sets them, else the network's default."""
    owners, channels = [*chosen, _default(model)], model.in_chans
    mean, std = (next(v for owner in owners if (v := getattr(owner, name)) is not None) for name in ("mean", "std"))
    return Normalisation(*(tuple(values) * (channels if len(values) == 1 else 1) for values in (mean, std)))


def _default(model: Model) -> Normalisation:
    """Return timm's normalisation for timm:NAME, ImageNet's for other networks.

    One channel has the average of the three. Other numbers of channels have no default; recipe/pixels.py refuses them.
    """
    found = _of_timm(model) if model.name.startswith(PREFIX) else IMAGENET
    if model.in_chans != 1:
        return found
    return Normalisation(*((sum(values) / len(values),) for values in (found.mean, found.std)))


def as_stored(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that a checkpoint or an export holds. Before data.mean existed, all images were normalised by
    ImageNet's figures: they are filled in where the key is missing."""
    data = recipe.get("data", {})
    return recipe | {"data": {"mean": list(IMAGENET.mean), "std": list(IMAGENET.std)} | data}


def _of_timm(model: Model) -> Normalisation:
    """Return what timm's own resolve_data_config gives for the network that these settings build."""
    entry = model.name.removeprefix(PREFIX)
    config = timm.get_pretrained_cfg(entry) if timm.is_model(entry) else None
    if config is None:
        return IMAGENET  # an unknown name; create_model says so
    found = resolve_data_config(pretrained_cfg=config.to_dict())
    return Normalisation(tuple(found["mean"]), tuple(found["std"]))

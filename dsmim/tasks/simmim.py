"""Masked image modelling: training on fresh masks, validation on one fixed mask per image."""

from __future__ import annotations

import torch

from dsmim.data.decode import Buffer
from dsmim.data.masking import RandomMask
from dsmim.data.normalisation import normalisation
from dsmim.data.transforms import Transform, eval_transform, train_transform
from dsmim.models import SimMIM, layer_ids
from dsmim.recipe import Recipe
from dsmim.tasks.base import Batch, Forward, Task, encoder_from


class _MaskedSample:
    """An augmented image and its mask. In evaluation the random stream is that of the sample, so its mask is fixed."""

    def __init__(self, recipe: Recipe, model_patch: int, transform: Transform):
        self.transform = transform
        self.mask = RandomMask(recipe.model.img_size, recipe.task.mask_patch, model_patch, recipe.task.mask_ratio)

    def __call__(self, image: Buffer, label: int | None) -> Batch:
        return {"image": self.transform(image), "mask": self.mask()}


class MaskedImageModelling(Task):
    """SimMIM (arXiv 2111.09886, as used by arXiv 2206.04664)."""

    def __init__(self, recipe: Recipe):
        encoder = encoder_from(recipe, num_classes=0)
        self.model = SimMIM(encoder, recipe.task.target_window)
        inner = {f"encoder.{name}": layer for name, layer in layer_ids(encoder).items()}
        top = max(inner.values())
        outer = {name: top for name, _ in self.model.named_parameters() if name not in inner}
        self.layers = inner | outer | {"mask_token": 0}
        augment, size, patch = recipe.data.augment, recipe.model.img_size, self.model.patch
        self.normalise = normalisation(recipe)
        self.train_sample = _MaskedSample(recipe, patch, train_transform(augment, size, self.normalise))
        self.eval_sample = _MaskedSample(recipe, patch, eval_transform(augment, size, recipe.model.in_chans))

    def training_loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return SimMIM's mean L1 error of the hidden pixels."""
        return forward(self.normalise(batch["image"]), batch["mask"])

    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return (3,) float64: weighted sums of absolute errors, hidden values (pixels × channels) and samples."""
        images, mask, weight = self.normalise(batch["image"]), batch["mask"], batch["weight"].double()
        errors = forward(images, mask, reduction="image_sum").double()  # (B,)
        values = self.model.hidden_pixels(mask).sum(dim=(1, 2, 3)) * images.shape[1]  # (B,)
        return torch.stack([(errors * weight).sum(), (values * weight).sum(), weight.sum()])

    @torch.no_grad()
    def reconstruction(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images with their hidden pixels predicted, (B, C, H, W) uint8, and what is hidden, (B, 1, H, W)
        bool. A normalised target is undone, see SimMIM.undo_target."""
        images, mask = self.normalise(batch["image"]), batch["mask"]
        prediction = self.model.undo_target(self.model.reconstruct(images, mask).float(), images)
        hidden = self.model.hidden_pixels(mask)
        return torch.where(hidden, self.normalise.undo(prediction), batch["image"]), hidden

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Return the mean absolute error of a hidden value, NaN if nothing is hidden, and the number of samples."""
        error, values, samples = sums.tolist()
        return {"loss": error / values if values else float("nan"), "samples": int(samples)}

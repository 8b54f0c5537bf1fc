"""Supervised classification, from scratch or from pre-trained weights."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dsmim.data.decode import Buffer
from dsmim.data.normalisation import normalisation
from dsmim.data.transforms import Transform, eval_transform, train_transform
from dsmim.models import layer_ids
from dsmim.recipe import Recipe
from dsmim.tasks.base import Batch, Forward, Task, encoder_from
from dsmim.tasks.losses import LOSSES
from dsmim.tasks.mixing import mix


class _LabelledSample:
    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, image: Buffer, label: int | None) -> Batch:
        return {"image": self.transform(image), "label": label}


class Classify(Task):
    """Classification over soft targets (label smoothing, mixup, CutMix), with the loss of task.loss."""

    def __init__(self, recipe: Recipe):
        self.settings, self.seed = recipe.task, recipe.seed
        self.classes, self.loss = recipe.task.num_classes, LOSSES[recipe.task.loss]
        self.model = encoder_from(recipe, num_classes=self.classes)
        self.layers = layer_ids(self.model)
        augment, size, self.normalise = recipe.data.augment, recipe.model.img_size, normalisation(recipe)
        self.train_sample = _LabelledSample(train_transform(augment, size, self.normalise))
        self.eval_sample = _LabelledSample(eval_transform(augment, size, recipe.model.in_chans))

    def check_micro_batch(self, size: int) -> None:
        """Raise ValueError for an odd size with mixup or CutMix, which pair neighbours."""
        if problem := self.settings.odd_batch("batch.micro_batch", size):
            raise ValueError(problem)

    def training_loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return the mean loss over soft targets, after mixup or CutMix."""
        images, targets = self.normalise(batch["image"]), self._targets(batch["label"])
        if self.settings.mixes:
            images, targets = mix(images, targets, batch["position"], self.settings, self.seed)
        return self.loss(forward(images).float(), targets)

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return (B, classes) in fp32 for images that were not mixed."""
        return forward(self.normalise(batch["image"])).float()

    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return (3,) float64: weighted sums of cross entropy (hard labels, whatever task.loss), right answers and
        samples."""
        return self.sums(self.logits(forward, batch), batch["label"], batch["weight"].double())

    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the sums of validation_sums for logits (B, classes), labels (B,) and weights (B,)."""
        losses = F.cross_entropy(logits, labels, reduction="none").double()  # (B,)
        right = (logits.argmax(dim=-1) == labels).double()
        return torch.stack([(losses * weight).sum(), (right * weight).sum(), weight.sum()])

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Return mean loss, top-1 accuracy (0 to 1) and the number of samples; without samples the means are NaN."""
        loss, right, samples = sums.tolist()
        count = samples or float("nan")
        return {"loss": loss / count, "accuracy": right / count, "samples": int(samples)}

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return (B, classes): 1 - s on the label plus s / classes everywhere, as timm's mixup_target."""
        smoothing = self.settings.label_smoothing
        return F.one_hot(labels, self.classes).float() * (1 - smoothing) + smoothing / self.classes

"""Supervised classification, from scratch or from pre-trained weights."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dsmim.data.decode import Buffer
from dsmim.data.normalisation import normalisation
from dsmim.data.transforms import Transform, eval_transform, train_transform
from dsmim.models import freeze_all_but_classifier, layer_ids
from dsmim.recipe import Recipe
from dsmim.shards.index import ShardIndex
from dsmim.tasks.base import Batch, Forward, Task, encoder_from
from dsmim.tasks.label_map import LabelMap
from dsmim.tasks.losses import LOSSES
from dsmim.tasks.mixing import mix
from dsmim.tasks.ranking import accuracies, places, right_within


class _LabelledSample:
    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, image: Buffer, label: int | None) -> Batch:
        return {"image": self.transform(image), "label": label}


class Classify(Task):
    """Classification over soft targets (label smoothing, mixup, CutMix), with the loss of task.loss."""

    scored: list[int]
    """The classes that compete in a validation, sorted."""
    label_map: LabelMap | None = None
    """What the samples' labels mean, where they are not the model's classes."""

    def __init__(self, recipe: Recipe):
        if recipe.task.name != "classify":
            raise ValueError(
                f"{recipe.name}: its task is {recipe.task.name}, which knows no classes; give a run that classifies "
                "(fine-tune this one: model.weights=RUN)"
            )
        self.settings, self.seed = recipe.task, recipe.seed
        self.classes, self.loss = recipe.task.num_classes, LOSSES[recipe.task.loss]
        self.scored = list(range(self.classes))
        self.model = encoder_from(recipe, num_classes=self.classes)
        if recipe.model.trainable == "head":
            freeze_all_but_classifier(self.model)
        self.layers = layer_ids(self.model)
        augment, size, self.normalise = recipe.data.augment, recipe.model.img_size, normalisation(recipe)
        self.train_sample = _LabelledSample(train_transform(augment, size, self.normalise))
        self.eval_sample = _LabelledSample(eval_transform(augment, size, recipe.model.in_chans))

    def use_label_map(self, label_map: LabelMap) -> None:
        """Measure samples whose labels mean what the map says."""
        self.label_map, self.classes, self.scored = label_map, len(label_map.rows), label_map.scored

    def check_samples(self, recipe: Recipe, shards: list[ShardIndex]) -> None:
        """Raise ValueError for labels that are not the model's classes, or not in the label map."""
        if self.label_map is None:
            super().check_samples(recipe, shards)
        else:
            self.label_map.check(shards)

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

    def measured(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what a validation counts: logits (B, classes) in fp32, labels (B,), weights (B,) float64."""
        logits, labels, weight = self.logits(forward, batch), batch["label"], batch["weight"].double()
        return (logits, labels, weight) if self.label_map is None else self.label_map.apply(logits, labels, weight)

    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return float64 weighted sums: cross entropy (hard labels, whatever task.loss), right answers at top 1 and,
        with more than 5 classes, at top 5, samples."""
        return self.sums(*self.measured(forward, batch))

    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the sums of validation_sums for what `measured` returns."""
        losses = F.cross_entropy(logits, labels, reduction="none").double()  # (B,)
        loss = (losses * weight).masked_fill(weight == 0, 0).sum()  # the loss of a padding image need not be finite
        place = places(logits, F.one_hot(labels, logits.shape[-1]).bool())
        return torch.stack([loss, *right_within(place, weight, len(self.scored)), weight.sum()])

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Return mean loss, accuracy (top 1, 0 to 1), accuracy_top5 with more than 5 classes, and the number of
        samples; without samples the means are NaN."""
        loss, *right, samples = sums.tolist()
        mean = loss / (samples or float("nan"))
        return {"loss": mean, **accuracies(right, samples, len(self.scored)), "samples": int(samples)}

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return (B, classes): 1 - s on the label plus s / classes everywhere, as timm's mixup_target."""
        smoothing, classes = self.settings.label_smoothing, self.settings.num_classes
        return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes

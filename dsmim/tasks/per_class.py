"""Classification, measured class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsmim.data.class_names import class_names
from dsmim.recipe import Recipe
from dsmim.tasks.base import Batch, Forward
from dsmim.tasks.classify import Classify

MAX_CONFUSION = 4096
"""Classes of a confusion matrix, at most: 128 MiB of counts."""


class PerClass(Classify):
    """Classification that knows its classes' names, and whose metrics include each class's accuracy.

    names: a file that lists the names of the classes, see class_names. Raises ValueError for a run that does not
    classify, and for a list of another number of classes.
    """

    def __init__(self, recipe: Recipe, names: Path | None = None):
        if recipe.task.name != "classify":
            raise ValueError(
                f"{recipe.name}: its task is {recipe.task.name}, which knows no classes; give a run that classifies "
                "(fine-tune this one: model.weights=RUN)"
            )
        super().__init__(recipe)
        self.names = class_names(recipe.data, self.classes, names) or [""] * self.classes

    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return float64 sums: those of Classify, then for each class its right answers, then its samples."""
        logits, labels, weight = self.logits(forward, batch), batch["label"], batch["weight"].double()
        return torch.cat([self.sums(logits, labels, weight), self.counts(logits.argmax(dim=-1), labels, weight)])

    def counts(self, answers: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (2 × classes,): right answers and samples of each class."""
        both = torch.stack([(answers == labels).double() * weight, weight])  # (2, B)
        counts = torch.zeros(2, self.classes, dtype=torch.float64, device=weight.device)
        return counts.index_add_(1, labels, both).view(-1)

    def metrics(self, sums: torch.Tensor) -> dict[str, Any]:
        """Return Classify's metrics, and `classes`: number, name, accuracy (None without samples) and samples of
        each."""
        own, counts = sums[: -2 * self.classes], sums[-2 * self.classes :]
        right, samples = counts.view(2, -1).long().tolist()
        rows = [
            {"class": number, "name": name, "accuracy": right[number] / count if count else None, "samples": count}
            for number, (name, count) in enumerate(zip(self.names, samples, strict=True))
        ]
        return super().metrics(own) | {"classes": rows}


class Confusion(PerClass):
    """Classification whose metrics include the confusion matrix too. Raises ValueError for too many classes."""

    def __init__(self, recipe: Recipe, names: Path | None = None):
        super().__init__(recipe, names)
        if self.classes > MAX_CONFUSION:
            raise ValueError(
                f"--confusion: a matrix of {self.classes} classes is too large, at most {MAX_CONFUSION}; give "
                "--per-class alone"
            )

    def counts(self, answers: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (classes²,): samples of each label (slowest) and answer."""
        matrix = torch.zeros(self.classes**2, dtype=torch.float64, device=weight.device)
        return matrix.index_add_(0, labels * self.classes + answers, weight)

    def metrics(self, sums: torch.Tensor) -> dict[str, Any]:
        """Return PerClass's metrics, and `confusion`: a row of counts per label, a column per answer."""
        own, matrix = sums[: -(self.classes**2)], sums[-(self.classes**2) :].view(self.classes, self.classes)
        per_class = torch.cat([own, matrix.diagonal(), matrix.sum(dim=1)])
        return super().metrics(per_class) | {"confusion": matrix.long().tolist()}

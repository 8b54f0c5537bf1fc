"""Classification, measured class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsmim.data.class_names import class_names
from dsmim.recipe import Recipe
from dsmim.tasks.base import Batch, Forward
from dsmim.tasks.classify import Classify
from dsmim.tasks.ranking import answers

MAX_CONFUSION = 4096
"""Classes of a confusion matrix, at most: 128 MiB of counts."""


class PerClass(Classify):
    """Classification that knows its classes' names, and whose metrics include each class's accuracy.

    names: a file that lists the names of the classes, see class_names. Raises ValueError for a run that does not
    classify, and for a list of another number of classes.
    """

    def __init__(self, recipe: Recipe, names: Path | None = None):
        super().__init__(recipe)
        self.total = self.classes  # a label map changes `classes`, the number of labels
        self.names = class_names(recipe.data, self.classes, names) or [""] * self.classes

    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return float64 sums: those of Classify, then for each class its right answers, then its samples."""
        logits, labels, weight = self.measured(forward, batch)
        return torch.cat([self.sums(logits, labels, weight), self.counts(answers(logits, labels), labels, weight)])

    def counts(self, given: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (2 × classes,): right answers and samples of each class. given (B,): the answers."""
        both = torch.stack([(given == labels).double() * weight, weight])  # (2, B)
        counts = torch.zeros(2, self.total, dtype=torch.float64, device=weight.device)
        return counts.index_add_(1, labels, both).view(-1)

    def metrics(self, sums: torch.Tensor) -> dict[str, Any]:
        """Return Classify's metrics, and `classes`: number, name, accuracy (None without samples) and samples of each
        class that competes."""
        own, counts = sums[: -2 * self.total], sums[-2 * self.total :]
        right, samples = counts.view(2, -1).long().tolist()
        rows = [
            {
                "class": number, "name": self.names[number], "samples": samples[number],
                "accuracy": right[number] / samples[number] if samples[number] else None,
            }
            for number in self.scored
        ]  # fmt: skip
        return super().metrics(own) | {"classes": rows}


class Confusion(PerClass):
    """Classification whose metrics include the confusion matrix too. Raises ValueError for too many classes."""

    def __init__(self, recipe: Recipe, names: Path | None = None):
        super().__init__(recipe, names)
        if self.total > MAX_CONFUSION:
            raise ValueError(
                f"--confusion: a matrix of {self.total} classes is too large, at most {MAX_CONFUSION}; give "
                "--per-class alone"
            )

    def counts(self, given: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return (classes²,): samples of each label (slowest) and answer."""
        matrix = torch.zeros(self.total**2, dtype=torch.float64, device=weight.device)
        return matrix.index_add_(0, labels * self.total + given, weight)

    def metrics(self, sums: torch.Tensor) -> dict[str, Any]:
        """Return PerClass's metrics, and `confusion`: a row of counts per label, a column per answer."""
        own, matrix = sums[: -(self.total**2)], sums[-(self.total**2) :].view(self.total, self.total)
        per_class = torch.cat([own, matrix.diagonal(), matrix.sum(dim=1)])
        return super().metrics(per_class) | {"confusion": matrix[self.scored][:, self.scored].long().tolist()}

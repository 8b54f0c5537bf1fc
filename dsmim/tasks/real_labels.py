"""Classification where an image may have several right labels, or none: ImageNet-ReaL (arXiv 2006.07159)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsmim.log import some
from dsmim.recipe import Recipe
from dsmim.shards.index import ShardIndex
from dsmim.tasks.base import Batch, Forward
from dsmim.tasks.classify import Classify
from dsmim.tasks.label_map import IMAGENET_CLASSES, timm_list
from dsmim.tasks.ranking import accuracies, places, right_within

REAL = "real"
_REAL_FILE = "imagenet_real_labels.json"
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?:\D.*)?")
"""The name of an image of ImageNet's validation set; its number counts from 1."""

RightLabels = Mapping[str, list[int]]
"""Name of an image → its right labels."""


class RealLabels(Classify):
    """Classification measured with given labels. The best right label of an image counts; an image without any is left
    out, as in google-research/reassessed-imagenet. The labels in the shards are not read.

    source: "real", or a JSON file, see read_right_labels. Raises ValueError when it cannot be used for this run.
    """

    def __init__(self, recipe: Recipe, source: str):
        super().__init__(recipe)
        self.source, self.right = source, read_right_labels(source, recipe.task.num_classes)
        self.classes = None

    def check_samples(self, recipe: Recipe, shards: list[ShardIndex]) -> None:
        """Raise ValueError when an image has no entry among the labels."""
        missing = [key for shard in shards for key in shard.table().keys if name_of(key, self.right) is None]
        if missing:
            raise ValueError(
                f"--labels {self.source}: has no entry for {len(missing)} samples of data.val: "
                f"{some(missing, len(missing), 5)}; name each sample by its key or the end of its key "
                "(ILSVRC2012_val_00000001), with [] for an image without label"
            )

    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return float64 weighted sums: right answers at top 1 and, with more than 5 classes, at top 5, samples."""
        logits, weight = self.logits(forward, batch), batch["weight"].double()
        right = torch.zeros(logits.shape, dtype=torch.bool)
        for row, (key, counts) in enumerate(zip(batch["key"], weight.tolist(), strict=True)):
            if counts:  # else it is a blank image in place of another, or padding
                right[row, self.right[name_of(key, self.right)]] = True
        right = right.to(logits.device)
        weight = weight * right.any(dim=-1)
        return torch.stack([*right_within(places(logits, right), weight, len(self.scored)), weight.sum()])

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Return accuracy, accuracy_top5 with more than 5 classes, and the number of samples with a label; no loss:
        cross entropy has no one meaning for several right labels."""
        *right, samples = sums.tolist()
        return {**accuracies(right, samples, len(self.scored)), "samples": int(samples)}


def read_right_labels(source: str, classes: int) -> RightLabels:
    """Return the labels of "real", which timm has, or of a JSON file: an object name → list of class numbers, or a list
    of such lists, one for each image of ImageNet's validation set in the order of their numbers.

    Raises ValueError when the file cannot be read or a number is not a class.
    """
    if source == REAL and classes != IMAGENET_CLASSES:
        raise ValueError(
            f"--labels {REAL}: holds classes of ImageNet-1K, {IMAGENET_CLASSES}; the model has {classes}. Give a file "
            "with classes of this model"
        )
    found = json.loads(timm_list(_REAL_FILE)) if source == REAL else _read(source)
    if isinstance(found, list):
        found = {f"ILSVRC2012_val_{number:08d}": labels for number, labels in enumerate(found, 1)}
    for name, labels in found.items():
        if not isinstance(labels, list) or any(type(n) is not int or not 0 <= n < classes for n in labels):
            raise ValueError(
                f"{source}: {name}: {labels!r} is no list of class numbers of this model (0 to {classes - 1}); give "
                "[3], [3, 8], or [] for an image without label"
            )
    return found


def name_of(key: str, right: RightLabels) -> str | None:
    """Return the name under which the labels have a sample: its key, the last part of its key, or the number in the
    name of an image of ImageNet's validation set. None: they do not have it."""
    last = key.rpartition("/")[2]
    number = _NUMBER.fullmatch(last)
    names = [key, last, *([f"ILSVRC2012_val_{number[1]}"] if number else [])]
    return next((name for name in names if name in right), None)


def _read(source: str) -> dict[str, Any] | list[Any]:
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--labels {source}: must be {REAL!r}, or a JSON file that gives each sample its right classes ({error})"
        ) from None
    if not isinstance(found, (dict, list)) or not found:
        raise ValueError(f"{source}: should be a JSON object: key of a sample → list of its right classes")
    return found

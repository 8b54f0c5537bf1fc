"""What the labels of another data set mean to a classifier: ImageNet-A, ImageNet-R and any list of rows.

Only the classes that some label means compete, as the authors of ImageNet-A and ImageNet-R measure:
`logits[:, indices]` in hendrycks/natural-adv-examples and hendrycks/imagenet-r.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from dsmim.shards.classes import CLASSES, read_names
from dsmim.shards.index import ShardIndex
from dsmim.shards.remote import is_remote
from dsmim.shards.sample_format import NO_LABEL

NAMED = {"imagenet-a": "imagenet_a_indices.txt", "imagenet-r": "imagenet_r_indices.txt"}
"""Name → timm's list of the set's 200 classes, sorted by their WordNet numbers, as rows of ImageNet-1K's 1000."""
LEFT_OUT = -1
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class LabelMap:
    """The row of the classifier that each label of a data set means."""

    source: str
    rows: tuple[int, ...]
    """By label; LEFT_OUT: samples with this label are not measured."""

    @property
    def scored(self) -> list[int]:
        """The rows that compete, sorted."""
        return sorted({row for row in self.rows if row != LEFT_OUT})

    def apply(
        self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits (B, classes) with -inf where a class does not compete, the labels' rows (B,), and the
        weights (B,) with 0 for samples that are left out."""
        rows = torch.tensor(self.rows, device=labels.device)[labels]
        outside = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        outside[self.scored] = False
        return logits.masked_fill(outside, -torch.inf), rows.clamp(min=0), weight * (rows != LEFT_OUT)

    def check(self, shards: list[ShardIndex]) -> None:
        """Raise ValueError when the map is not for the labels of these samples."""
        labels = np.unique(np.concatenate([shard.labels() for shard in shards]))
        if NO_LABEL in labels:
            raise ValueError(
                "data.val: there are samples without a class number; say where labels are by dsmim shards index "
                "--labels"
            )
        listed, where = _listed(shards)
        if listed is not None and listed != len(self.rows):
            raise ValueError(
                f"{self.source}: has rows for {len(self.rows)} labels, but {where} lists {listed} classes; give a row "
                f"for each label of data.val, {LEFT_OUT} to leave it out"
            )
        if labels.max() >= len(self.rows):
            raise ValueError(
                f"{self.source}: has rows for {len(self.rows)} labels, but data.val has the label {labels.max()}; give "
                f"a row for each label of data.val, {LEFT_OUT} to leave it out"
            )
        if all(self.rows[label] == LEFT_OUT for label in labels):
            raise ValueError(f"{self.source}: leaves out every label of data.val, so that nothing would be measured")


def read_label_map(choice: str, classes: int) -> LabelMap:
    """Return the map of a name in NAMED, or of a file: one row number per label, in lines of text or a JSON list.

    classes: the classifier's. Raises ValueError when the file cannot be read or a row is not the classifier's.
    """
    if choice in NAMED:
        if classes != IMAGENET_CLASSES:
            raise ValueError(
                f"--label-map {choice}: means rows of ImageNet-1K's {IMAGENET_CLASSES} classes, the model has "
                f"{classes}; give a file with a row of this model for each label"
            )
        return LabelMap(choice, tuple(map(int, timm_list(NAMED[choice]).split())))
    path = Path(choice)
    if not path.is_file():
        raise ValueError(
            f"--label-map {choice}: must be {', '.join(NAMED)}, or a file with one row number per label; there is no "
            "such file"
        )
    rows = _read_rows(path)
    wrong = [row for row in rows if type(row) is not int or not LEFT_OUT <= row < classes]
    if wrong or not rows:
        what = f"{wrong[0]!r}" if wrong else "an empty file"
        raise ValueError(
            f"{path}: {what} is no row of a classifier of {classes} classes; give 0 to {classes - 1} for each label, "
            f"or {LEFT_OUT} to leave it out"
        )
    return LabelMap(str(path), tuple(rows))


def timm_list(name: str) -> str:
    """Return the text of one of timm's lists about ImageNet. Raises ValueError for a timm without it."""
    try:
        return (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")
    except OSError:
        raise ValueError(f"the installed timm has no {name}; install a newer timm, or give a file") from None


def _read_rows(path: Path) -> list:
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else [_number(word) for word in text.split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as row numbers ({error})") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: should be a JSON list of row numbers, one per label")
    return found


def _number(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word


def _listed(shards: list[ShardIndex]) -> tuple[int | None, str]:
    """Return how many labels the samples are known to have, None if that is not known, and what says so."""
    if shards[0].classes:
        return len(shards[0].classes), "data.classes"
    file = Path(shards[0].file).parent / CLASSES
    if is_remote(shards[0].tar) or not file.is_file():
        return None, ""
    return len(read_names(file)), str(file)

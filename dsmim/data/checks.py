"""What a run's indexes know before its first step: labels that do not fit the task, and shards in both sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsmim.recipe import Recipe
from dsmim.shards.classes import CLASSES, read_names
from dsmim.shards.index import ShardIndex
from dsmim.shards.remote import is_remote
from dsmim.shards.sample_format import NO_LABEL
from dsmim.shards.tar import read_sample

Shards = list[ShardIndex]
_EXAMPLES = 3


def check_data(recipe: Recipe, train: Shards | None, validation: Shards | None) -> list[str]:
    """Return what the log should say about the samples of a run. Raises ValueError that lists what would stop it."""
    if problems := data_problems(recipe, train, validation):
        raise ValueError("\n".join(problems))
    return _notes(recipe, train, validation)


def data_problems(recipe: Recipe, train: Shards | None, validation: Shards | None) -> list[str]:
    """Return one line per reason why the run cannot use its samples: labels, and shards in both sets.

    A task that needs no labels has no problem with them. Indexes that count their labels are not read again.
    """
    classes, problems = _num_classes(recipe), []
    for what, shards in (("data.train", train), ("data.val", validation)):
        if shards and classes is not None:
            problems += _label_problems(what, shards, classes)
    if (shared := _shared(train, validation)) and not _same(train, validation):
        problems.append(
            f"data.train and data.val share {len(shared)} shards, such as {_pair(*shared[0])}: validation would "
            "measure samples that are trained on; name the training shards alone, as in data.train='FOLDER/train-*.tar'"
        )
    return problems


def _num_classes(recipe: Recipe) -> int | None:
    return getattr(recipe.task, "num_classes", None)


def _label_problems(what: str, shards: Shards, classes: int) -> list[str]:
    suspects = [shard for shard in shards if not _fits(shard, classes)]
    found = [(shard, shard.labels()) for shard in suspects]
    total = sum(shard.samples for shard in shards)
    problems = []
    if missing := sum(int((labels == NO_LABEL).sum()) for _, labels in found):
        problems.append(
            f"{what}: {missing} of {total} samples have no class number, such as {_first(found, NO_LABEL)}; say where "
            "labels are by dsmim shards index --labels, or train on samples of given classes alone by data.classes"
        )
    outside = sorted({int(label) for _, labels in found for label in np.unique(labels[labels >= classes])})
    if outside:
        count = sum(int((labels >= classes).sum()) for _, labels in found)
        problems.append(
            f"{what}: {count} of {total} samples have class numbers that task.num_classes {classes} does not allow "
            f"(0 to {classes - 1}): {_listed(outside)}, such as {_first(found, outside[0])}; set task.num_classes="
            f"{outside[-1] + 1}, or list the classes in use in data.classes, which numbers them from 0"
        )
    return problems


def _fits(shard: ShardIndex, classes: int) -> bool:
    """Return whether the counts in an index show that every label is right."""
    if shard.classes:
        return len(shard.classes) <= classes
    return shard.unlabelled == 0 and shard.highest is not None and shard.highest < classes


def _first(found: list[tuple[ShardIndex, np.ndarray]], label: int) -> str:
    """Return the first samples with a label, and what is in the first one's KEY.cls when that is no number."""
    names = []
    for shard, labels in found:
        rows = np.flatnonzero(labels == label)[: _EXAMPLES - len(names)].tolist()
        if rows:
            table = shard.table()
            names += [f"{table.keys[row]} in {shard.tar}" for row in rows]
            text = _cls(shard, rows[0]) if label == NO_LABEL and len(names) == len(rows) else ""
            names[0] += text
        if len(names) >= _EXAMPLES:
            break
    return ", ".join(names)


def _cls(shard: ShardIndex, row: int) -> str:
    if is_remote(shard.tar):
        return ""
    with Path(shard.tar).open("rb") as file:
        key, members = read_sample(file, *shard.table().whole(row))
    return f" ({key}.cls is {bytes(members['cls'][:20]).decode(errors='replace')!r})" if "cls" in members else ""


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f", … {numbers[-1]}" if len(numbers) > 5 else "")


def _shared(train: Shards | None, validation: Shards | None) -> list[tuple[ShardIndex, ShardIndex]]:
    """Return the shards of one content that are in both sets, under whichever path."""
    ours = {shard.sha256: shard for shard in train or ()}
    return [(ours[shard.sha256], shard) for shard in validation or () if shard.sha256 in ours]


def _same(train: Shards | None, validation: Shards | None) -> bool:
    """Return whether both sets are the same shards: then it is meant so, for a test of the model or of the data."""
    first, second = ({shard.sha256 for shard in shards or ()} for shards in (train, validation))
    return first == second


def _pair(train: ShardIndex, validation: ShardIndex) -> str:
    return (
        train.tar if train.tar == validation.tar else f"{train.tar} and {validation.tar}, which have the same contents"
    )


def _notes(recipe: Recipe, train: Shards | None, validation: Shards | None) -> list[str]:
    notes = [*_unused_classes(recipe, train)]
    if _shared(train, validation):
        notes.append("data.val names the shards of data.train: validation measures the samples that are trained on")
    return notes


def _unused_classes(recipe: Recipe, train: Shards | None) -> Iterator[str]:
    """Yield a warning when the task has more classes than the data."""
    classes = _num_classes(recipe)
    if classes is None or not train:
        return
    file = Path(train[0].file).parent / CLASSES
    if train[0].classes:
        known, where = len(train[0].classes), "data.classes"
    elif file.is_file():
        known, where = len(read_names(file)), str(file)
    else:
        return
    if classes > known:
        yield f"warning: task.num_classes is {classes}, but {where} lists {known} classes: the others are never seen"

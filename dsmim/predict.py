"""The classes that a trained classifier gives to images, with or without labels: the same at any world size."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dsmim.data.dataset import EvalDataset
from dsmim.data.images import open_images
from dsmim.engine.runtime import Runtime, joined
from dsmim.evaluate import Trained, evaluation_batches, limits_of, open_trained
from dsmim.health.interrupt import Interrupt
from dsmim.recipe import Recipe
from dsmim.shards.atomic import write_atomically
from dsmim.tasks import Task
from dsmim.tasks.per_class import PerClass

SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Predictions:
    """The k most probable classes of N images, in the order of the images."""

    source: str
    """The checkpoint."""
    images: list[tuple[str, str]]
    """Shard and key of a sample; of a file nothing, and its path."""
    classes: torch.Tensor
    """(N, k) int64, the most probable first; -1 for an image that cannot be decoded."""
    probabilities: torch.Tensor
    """(N, k) float64; NaN for an image that cannot be decoded."""
    names: list[str]
    """Names of the classes by number; empty texts if they are not known."""

    @property
    def undecodable(self) -> int:
        """Number of images without a prediction."""
        return int((self.classes[:, 0] < 0).sum())


def predict(
    path: Path, inputs: list[str], overrides: list[str], top: int = 5, which: str = "fp32", names: Path | None = None
) -> Predictions:
    """Classify images by a checkpoint, or by a run's newest valid one. Every rank calls it and gets all predictions.

    inputs: image files, folders or patterns of them, or shards; labels are not read. top: classes per image, at most
    (no more than the model has). which: "fp32" for the weights, "ema" for their moving average. names: a file that
    lists the names of the classes; None: classes.json beside the training shards, if it is there. Raises ValueError for
    what a user can fix.
    """

    def open_inputs(recipe: Recipe, task: Task, runtime: Runtime) -> EvalDataset:
        return open_images(inputs, recipe.data, task.eval_sample)

    with joined(*limits_of(path, overrides)) as runtime:
        trained = open_trained(path, overrides, which, runtime, partial(PerClass, names=names), open_inputs)
        classes, probabilities = _most_probable(trained, min(top, trained.task.classes), runtime)
        images = [trained.data.name(number) for number in range(len(trained.data))]
        return Predictions(trained.source, images, classes, probabilities, trained.task.names)


@torch.no_grad()
def _most_probable(trained: Trained, top: int, runtime: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """Return classes and probabilities, (N, top) each. Collective. Raises Stopped when no image can be decoded."""
    classes = torch.full((len(trained.data), top), -1)
    probabilities = torch.full((len(trained.data), top), torch.nan, dtype=torch.float64)
    own = []
    fate = "without a prediction (its row stays empty)"
    for batch in evaluation_batches(trained.model, trained.data, trained.recipe, runtime, Interrupt(), fate):
        found = trained.task.logits(trained.model, batch).double().softmax(dim=-1).topk(top)  # two tensors (B, top)
        seen = batch["weight"] > 0  # neither padding nor undecodable
        own.append([tensor[seen].cpu() for tensor in (batch["number"], found.indices, found.values)])
    for numbers, indices, values in (part for parts in runtime.gather(own) for part in parts):
        classes[numbers], probabilities[numbers] = indices, values
    with runtime.all_or_none():
        if (classes < 0).all():
            raise ValueError(
                f"none of the {len(classes)} images can be decoded (the faults are named above), so there is nothing "
                "to predict; give other images"
            )
    return classes, probabilities


def check_output(out: Path) -> None:
    """Check that predictions can be written to such a file. Raises ValueError for another suffix, and for .parquet
    without pyarrow."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the suffix decides the kind of file; it must be {' or '.join(SUFFIXES)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"--out {out}: writing Parquet needs pyarrow, which is not installed; pip install pyarrow, or "
                         f"give {out.with_suffix('.csv')}")  # fmt: skip


def write_predictions(found: Predictions, out: Path) -> None:
    """Write a row per image, in their order: image, shard (if shards were given), and for each of the k classes
    class_1, name_1 (if names are known), probability_1, …

    CSV: probabilities with six digits after the point, empty fields for an image that cannot be decoded. Parquet:
    float64 and nulls.
    """
    buffer = io.BytesIO()
    (_write_csv if out.suffix == ".csv" else _write_parquet)(dict(_columns(found)), buffer)
    write_atomically(out, buffer.getvalue())


def _columns(found: Predictions) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the values of each column; None: no value."""
    yield "image", [image for _, image in found.images]
    if any(shard for shard, _ in found.images):
        yield "shard", [shard for shard, _ in found.images]
    for place in range(found.classes.shape[1]):
        numbers = [number if number >= 0 else None for number in found.classes[:, place].tolist()]
        pairs = zip(numbers, found.probabilities[:, place].tolist(), strict=True)
        yield f"class_{place + 1}", numbers
        if any(found.names):
            yield f"name_{place + 1}", [None if number is None else found.names[number] for number in numbers]
        yield f"probability_{place + 1}", [None if number is None else share for number, share in pairs]


def _write_csv(columns: dict[str, list[Any]], buffer: io.BytesIO) -> None:
    text = io.TextIOWrapper(buffer, "utf-8", "surrogateescape", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(f"{value:.6f}" if isinstance(value, float) else value for value in row)
    text.detach()


def _write_parquet(columns: dict[str, list[Any]], buffer: io.BytesIO) -> None:
    import pyarrow
    import pyarrow.parquet

    readable = {name: [_utf8(value) for value in values] for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(readable), buffer)


def _utf8(value: Any) -> Any:
    """Return a value that Parquet can hold: bytes of a file name that are no UTF-8 become question marks."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

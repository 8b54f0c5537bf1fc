"""Exact evaluation: every sample counts once, and the figures are the same at any world size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmim.checkpoint import reading, zero_shards
from dsmim.checkpoint.recorded_paths import find_shards
from dsmim.data.dataset import EvalDataset
from dsmim.data.from_recipe import open_reader, validation_shards
from dsmim.data.loader import eval_loader
from dsmim.engine.construct import construct
from dsmim.engine.runtime import Runtime, joined
from dsmim.engine.zero import resolve_precision
from dsmim.health.interrupt import Interrupt
from dsmim.models import fix_position_bias
from dsmim.recipe import Recipe
from dsmim.recipe.reading import stored_recipe
from dsmim.tasks import Task, build_task
from dsmim.tasks.base import Batch
from dsmim.weights.match import State, complete


@dataclass(frozen=True)
class Trained:
    """A checkpoint's network on every rank, and the samples that it is to see."""

    source: str
    """The checkpoint."""
    recipe: Recipe
    task: Task
    model: Autocast
    """Whole on every rank, without DeepSpeed, for checkpoints of any ZeRO stage."""
    data: EvalDataset


def evaluate(
    path: Path, overrides: list[str], which: str = "fp32", task_of: Callable[[Recipe], Task] = build_task
) -> dict[str, Any]:
    """Measure a checkpoint, or a run's newest valid one, on data.val. Every rank calls it and gets the figures.

    which: "fp32" for the weights, "ema" for their moving average. task_of: what is measured, such as PerClass of
    tasks/per_class.py. Raises ValueError for what a user can fix.
    """

    def open_checked(recipe: Recipe, task: Task, runtime: Runtime) -> EvalDataset:
        data = open_validation(recipe, task, runtime)
        runtime.on_rank_zero(lambda: task.check_samples(recipe, data.reader.shards))
        return data

    with joined(*limits_of(path, overrides)) as runtime:
        trained = open_trained(path, overrides, which, runtime, task_of, open_checked)
        figures = validate(trained.model, trained.task, trained.data, trained.recipe, runtime, Interrupt())
        assert figures is not None  # nothing asks this Interrupt to stop: an evaluation has nothing to save
        return {"checkpoint": trained.source, "data": trained.recipe.data.val, **figures}


def open_trained(
    path: Path, overrides: list[str], which: str, runtime: Runtime, task_of: Callable[[Recipe], Task],
    open_data: Callable[[Recipe, Task, Runtime], Any],
) -> Trained:  # fmt: skip
    """Read a checkpoint, or a run's newest valid one, and open samples for it. Collective; rank 0 reads the weights."""
    found = runtime.on_rank_zero(lambda: str(reading.locate(path)))
    with runtime.all_or_none():
        recipe = recipe_of(Path(found), overrides)
        task = task_of(recipe)
        data = open_data(recipe, task, runtime)
        state = weights_for(task, Path(found), which) if runtime.is_rank_zero else None
    construct(task.model, task.fill(state), {}, 0, runtime)
    del state
    runtime.broadcast(task.model)
    return Trained(found, recipe, task, Autocast(task.model, recipe, runtime), data)


def limits_of(path: Path, overrides: list[str]) -> tuple[float, ...]:
    """Return engine.timeout_minutes and log.low_memory of the newest checkpoint's recipe, nothing if it has none.

    They count from the start, because ranks wait while rank 0 compares a whole checkpoint with its digests.
    """
    newest = next(iter([*reading.candidates(path / "checkpoints"), *reading.candidates(path)]), path)
    try:
        recipe = recipe_of(newest, overrides)
    except ValueError:  # reported later, by one rank
        return ()
    return recipe.engine.timeout_minutes, recipe.log.low_memory


def recipe_of(path: Path, overrides: list[str]) -> Recipe:
    """Return the recipe that a checkpoint was trained with, changed by `key=value` overrides. Its shards are found from
    another folder than the run's too."""
    state = reading.read_state(path)
    recipe = state["recipe"] | {"data": find_shards(state["recipe"]["data"], state)}
    return stored_recipe(recipe, str(path), overrides)


def weights_for(task: Task, found: Path, which: str = "fp32") -> State:
    """Return a checkpoint's weights for Task.fill. Raises ValueError when they belong to another model."""
    return complete(task.model, zero_shards.read_weights(found, which), str(found))


def open_validation(recipe: Recipe, task: Task, runtime: Runtime) -> EvalDataset:
    """Open the recipe's validation samples. Collective: rank 0 opens the index files for all ranks. Raises Stopped when
    shards or index files are missing."""
    with runtime.all_or_none():
        shards = runtime.on_rank_zero(lambda: validation_shards(recipe.data))
        reader = open_reader(recipe.data, shards, window=1)
    return EvalDataset(reader, task.eval_sample, task.classes)


@torch.no_grad()
def validate(
    model: Any, task: Task, data: EvalDataset, recipe: Recipe, runtime: Runtime, interrupt: Interrupt
) -> dict[str, float] | None:
    """Return the task's metrics over the whole set; None when a rank was asked to stop before the end. Collective.

    model: the engine, or a module. Where there are any, the metrics have also the number of images that could not be
    decoded, and of those that the task left out.
    """
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    decoded = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for batch in evaluation_batches(model, data, recipe, runtime, interrupt):
        if batch is None:
            return None
        total = total + task.validation_sums(model, batch)
        decoded = decoded + batch["weight"].double().sum()
    figures, decoded = task.metrics(runtime.sum(total)), int(runtime.sum(decoded))
    counts = {"left_out": decoded - figures["samples"], "undecodable": len(data) - decoded}
    return figures | {name: count for name, count in counts.items() if count}


def evaluation_batches(
    model: Any, data: EvalDataset, recipe: Recipe, runtime: Runtime, interrupt: Interrupt,
    fate: str = "left out of the evaluation",
) -> Iterator[Batch | None]:  # fmt: skip
    """Yield this rank's batches, on its device, with the model in evaluation mode. Collective: ranks get equally many,
    and each sample has weight 1 on exactly one rank. When a rank was asked to stop, yield None and end.

    fate: what becomes of an undecodable image, for the message about it.
    """
    model.eval()
    pin = runtime.device.type == "cuda"
    workers = min(recipe.data.workers, 4)
    loader = eval_loader(data, recipe.batch.eval_batch, runtime.world_size, runtime.rank, workers, pin)
    batches = iter(loader)
    for number in range(len(loader)):
        runtime.phase("waiting for validation data, batch", number)
        batch = interrupt.fetch(batches)
        runtime.phase("validation, batch", number)
        if runtime.any(interrupt.reason is not None)[0]:
            yield None
            return
        for fault in batch["undecodable"]:
            print(f"undecodable image {fate}: {fault}", file=sys.stderr, flush=True)
        yield to_device(batch, runtime.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the batch's tensors to the device; images stay uint8."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class Autocast:
    """A plain module, called as the engine calls it: under bf16 autocast if the recipe trains in bf16."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, runtime: Runtime):
        self.model, self.device = model, runtime.device.type
        self.bf16 = resolve_precision(recipe.engine.precision, runtime.device) == "bf16"

    def __call__(self, *inputs: Any, **options: Any) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.model(*inputs, **options)

    def eval(self) -> None:
        self.model.eval()
        fix_position_bias(self.model)

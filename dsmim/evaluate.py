"""Exact evaluation: every sample counts once, and the figures are the same at any world size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from dsmim.checkpoint import reading, zero_shards
from dsmim.data.checks import check_data
from dsmim.data.dataset import EvalDataset
from dsmim.data.from_recipe import open_reader, validation_shards
from dsmim.data.loader import eval_loader
from dsmim.engine.construct import construct
from dsmim.engine.runtime import Runtime, joined
from dsmim.engine.zero import resolve_precision
from dsmim.health.interrupt import Interrupt
from dsmim.models import fix_position_bias
from dsmim.recipe import Recipe
from dsmim.recipe.reading import apply_overrides
from dsmim.tasks import Task, build_task
from dsmim.tasks.base import Batch
from dsmim.weights.match import State, complete


def evaluate(path: Path, overrides: list[str], which: str = "fp32") -> dict[str, Any]:
    """Measure a checkpoint, or a run's newest valid one, on data.val. Every rank calls it and gets the figures.

    which: "fp32" for the weights, "ema" for their moving average. Every rank holds the whole model, without DeepSpeed,
    for checkpoints of any ZeRO stage. Raises ValueError for what a user can fix.
    """
    with joined() as runtime:
        found = runtime.on_rank_zero(lambda: str(reading.locate(path)))
        with runtime.all_or_none():
            recipe = recipe_of(Path(found), overrides)
            task = build_task(recipe)
            data = open_validation(recipe, task, runtime)
            runtime.on_rank_zero(lambda: check_data(recipe, None, data.reader.shards))
            state = weights_for(task, Path(found), which) if runtime.is_rank_zero else None
        construct(task.model, task.fill(state), {}, 0, runtime)
        del state
        runtime.broadcast(task.model)
        model = _Autocast(task.model, recipe, runtime)
        figures = validate(model, task, data, recipe, runtime, Interrupt())
        assert figures is not None  # nothing asks this Interrupt to stop: an evaluation has nothing to save
        return {"checkpoint": found, "data": recipe.data.val, **figures}


def recipe_of(path: Path, overrides: list[str]) -> Recipe:
    """Return the recipe that a checkpoint was trained with, changed by `key=value` overrides."""
    return apply_overrides(reading.read_state(path)["recipe"], str(path), overrides)


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

    model: the engine, or a module.
    """
    model.eval()
    pin = runtime.device.type == "cuda"
    workers = min(recipe.data.workers, 4)
    loader = eval_loader(data, recipe.batch.eval_batch, runtime.world_size, runtime.rank, workers, pin)
    total, batches = torch.zeros((), dtype=torch.float64, device=runtime.device), iter(loader)
    for number in range(len(loader)):
        runtime.phase("waiting for validation data, batch", number)
        batch = interrupt.fetch(batches)
        runtime.phase("validation, batch", number)
        if runtime.any(interrupt.reason is not None)[0]:
            return None
        for fault in batch["undecodable"]:
            print(f"undecodable image left out of the evaluation: {fault}", file=sys.stderr, flush=True)
        total = total + task.validation_sums(model, to_device(batch, runtime.device))
    figures = task.metrics(runtime.sum(total))
    missing = len(data) - figures["samples"]
    return figures | ({"undecodable": missing} if missing else {})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the batch's tensors to the device; images stay uint8."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class _Autocast:
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

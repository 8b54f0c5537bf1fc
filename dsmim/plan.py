"""A recipe in steps and ranks: micro batches, the learning rate, and when the run validates, saves and logs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dsmim.data.order import accumulation_steps, limited_accumulation, refit_accumulation
from dsmim.engine.schedule import LearningRate, resolve_schedule
from dsmim.recipe import Duration, Recipe
from dsmim.tasks import Task


@dataclass(frozen=True)
class Cadence:
    """When something happens: after each `every` steps and each `also` steps (0: never), and always at the end, after
    `total` steps."""

    every: int
    total: int
    also: int = 0

    def __call__(self, done: int) -> bool:
        """Return whether it happens after `done` completed steps."""
        return done == self.total or any(length > 0 and done % length == 0 for length in (self.every, self.also))


@dataclass(frozen=True)
class Plan:
    """What one session of a run does, in steps."""

    rate: LearningRate
    accumulation: int
    """Micro batches per rank and step."""
    micro_batch: int
    """Samples per micro batch."""
    validating: Cadence
    saving: Cadence
    """Besides what the clock (checkpoint.every.minutes) and checkpoint.keep_best save."""
    logging: Cadence
    keep_every: int
    """Steps between two checkpoints that are always kept; 0: none."""


def plan(recipe: Recipe, task: Task, epoch_samples: int, world_size: int, state: dict[str, Any] | None) -> Plan:
    """Return the plan of a session.

    epoch_samples: training samples per epoch; state: that of the checkpoint that the run resumes from, None for a new
    run. Raises ValueError when the ranks cannot share the global batch, or the task refuses the micro batch.
    """
    size = recipe.batch.global_batch
    rate = resolve_schedule(recipe.schedule, recipe.optim, size, epoch_samples)

    def cadence(every: Duration) -> Cadence:
        return Cadence(every.in_steps(size, epoch_samples), rate.total)

    accumulation = _accumulation(recipe, task, world_size, state)
    saving, keeping = recipe.checkpoint.every, recipe.checkpoint.keep_every
    keep_every = 0 if keeping is None else cadence(keeping).every
    return Plan(
        rate,
        accumulation,
        size // (world_size * accumulation),
        cadence(recipe.validation.every),
        replace(cadence(saving), also=keep_every),  # what is to be kept must be saved
        cadence(Duration(steps=recipe.log.every)),
        keep_every,
    )


def _accumulation(recipe: Recipe, task: Task, world_size: int, state: dict[str, Any] | None) -> int:
    """Return the micro batches per rank and step.

    A new run has exactly the recipe's micro batch, or the largest up to batch.max_micro_batch. A resumed run keeps its
    global batch at any number of ranks, with micro batches that are not larger than before or than that limit.
    """
    batch = recipe.batch
    limit = batch.max_micro_batch if batch.micro_batch == "auto" else None

    def accepts(size: int) -> bool:
        return _accepts(task, size)

    if state is not None:
        auto = limit or state.get("micro_batch", batch.global_batch)
        largest = auto if batch.micro_batch == "auto" else batch.micro_batch
        return refit_accumulation(batch.global_batch, largest, world_size, accepts)
    if limit is not None:
        return limited_accumulation(batch.global_batch, limit, world_size, accepts)
    steps = accumulation_steps(batch.global_batch, batch.micro_batch, world_size)
    task.check_micro_batch(batch.global_batch // (world_size * steps))
    return steps


def _accepts(task: Task, micro_batch: int) -> bool:
    try:
        task.check_micro_batch(micro_batch)
    except ValueError:
        return False
    return True

"""Find what would fail when a job starts, before it waits in a queue. One process, no GPU, no DeepSpeed engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmim.checkpoint import reading
from dsmim.checkpoint.recorded_paths import find_recipe_shards
from dsmim.checkpoint.run_directory import changed_error, changes_of
from dsmim.data.checks import data_problems
from dsmim.data.from_recipe import identity, training_shards, validation_shards
from dsmim.data.order import accumulation_steps, training_order
from dsmim.engine.ds_config import load_ds_config, owned_keys
from dsmim.engine.optim import check_optimizer
from dsmim.evaluate import recipe_of
from dsmim.plan import plan
from dsmim.recipe import Recipe
from dsmim.recipe.errors import RecipeError
from dsmim.shards.index import ShardIndex
from dsmim.tasks import Task, build_task
from dsmim.weights.files import PICKLED, unfinished


class Findings:
    """The problems of several checks."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def check(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the action returns. If it raises an error that a user can fix, add it (once) and return None."""
        try:
            return action(*arguments)
        except (ValueError, OSError) as error:
            problems = error.problems if isinstance(error, RecipeError) else [str(error)]
            self.problems += [problem for problem in problems if problem not in self.problems]
            return None


def check_training(recipe: Recipe, world_size: int, run_dir: Path, fork: bool) -> list[str]:
    """Return every problem that would stop this training at its start, one line each."""
    found = Findings()
    newest = next(iter(reading.candidates(run_dir / "checkpoints")), None)
    state = found.check(reading.read_state, newest) if newest else None
    recipe = find_recipe_shards(recipe, state or {})
    task, shards = found.check(build_task, recipe), found.check(training_shards, recipe.data)
    steps = found.check(_check_steps, recipe, task, shards, world_size, state)
    found.check(_check_deepspeed, recipe, world_size, steps)
    validation = None if recipe.data.val is None else found.check(validation_shards, recipe.data)
    found.problems += found.check(data_problems, recipe, shards, validation) or []
    found.check(_check_writable, run_dir)
    if newest is None and recipe.model.weights is not None:
        found.check(_check_weights, Path(recipe.model.weights))
    if state is not None and not fork:
        found.check(_check_same_run, run_dir, state, recipe, shards)
    return found.problems


def check_evaluation(run_dir: Path, overrides: list[str]) -> list[str]:
    """Return the problems of `dsmim evaluate` on a run directory or a checkpoint."""
    found = Findings()
    recipe = found.check(_recipe_of_run, run_dir, overrides)
    if recipe is not None:
        found.check(build_task, recipe)
        validation = found.check(validation_shards, recipe.data)
        found.problems += found.check(data_problems, recipe, None, validation) or []
    found.check(_check_writable, run_dir)
    return found.problems


def _check_steps(
    recipe: Recipe, task: Task | None, shards: list[ShardIndex] | None, world_size: int, state: dict[str, Any] | None
) -> int | None:
    """Return the micro batches per rank and step, None if unknown. Without task or shards, check only the batch."""
    if task is not None and shards is not None:
        order = training_order(recipe, shards)
        return plan(recipe, task, order.epoch_samples, world_size, state).accumulation
    if state is None:
        return accumulation_steps(recipe.batch.global_batch, recipe.batch.micro_batch, world_size)
    return None


def _check_deepspeed(recipe: Recipe, world_size: int, steps: int | None) -> None:
    config = load_ds_config(recipe.engine.deepspeed, owned_keys(recipe, world_size, steps))
    check_optimizer(recipe.optim, config)


def _check_writable(run_dir: Path) -> None:
    """Write to the nearest existing folder: permission bits do not show a read-only or full file system."""
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise ValueError(f"{run_dir}: cannot be written ({nearest}: {error.strerror})") from None


def _check_weights(path: Path) -> None:
    """Check that the weights exist and can be opened. Only the job reads them."""
    if path.is_dir():
        if not (path / reading.MANIFEST).is_file() and not (
            reading.candidates(path / "checkpoints") or reading.candidates(path)
        ):
            raise ValueError(f"model.weights: {path} contains no checkpoint; give a run directory or a checkpoint")
        if progress := unfinished(path):
            raise ValueError(f"model.weights: {progress}; wait until it is complete, or give one of its checkpoints")
    elif not path.is_file():
        raise ValueError(f"model.weights: {path}: no such file or run directory")
    elif path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"model.weights: {path}: the name must end in one of {', '.join(('.safetensors', *PICKLED))}")
    elif not os.access(path, os.R_OK):
        raise ValueError(f"model.weights: {path} cannot be read: no permission")


def _check_same_run(run_dir: Path, state: dict[str, Any], recipe: Recipe, shards: list[ShardIndex] | None) -> None:
    if changes := changes_of(state, recipe, {} if shards is None else identity(recipe.data, shards)):
        raise changed_error(run_dir, changes)


def _recipe_of_run(path: Path, overrides: list[str]) -> Recipe:
    itself = [path] if (path / reading.STATE).is_file() else []
    newest = next(iter([*itself, *reading.candidates(path / "checkpoints")]), None)
    if newest is None:
        raise ValueError(f"{path}: contains no checkpoint; give a run directory or a checkpoint")
    return recipe_of(newest, overrides)

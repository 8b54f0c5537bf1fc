"""What would fail once a job has started, found before it waits in a queue. One process, no GPU, no DeepSpeed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmim.checkpoint import reading
from dsmim.checkpoint.run_directory import changes_of
from dsmim.data.from_recipe import training_shards, validation_shards
from dsmim.data.order import accumulation_steps, training_order
from dsmim.engine.ds_config import load_ds_config, owned_keys
from dsmim.evaluate import recipe_of
from dsmim.plan import plan
from dsmim.recipe import Recipe
from dsmim.recipe.errors import RecipeError
from dsmim.shards.index import ShardIndex, fingerprint
from dsmim.tasks import Task, build_task
from dsmim.weights.files import PICKLED


class Findings:
    """Problems of several checks."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def of(self, check: Callable[..., Any], *arguments: Any) -> Any:
        """What the check gives; None when it raises what a user can mend, which is noted, once."""
        try:
            return check(*arguments)
        except (ValueError, OSError) as error:
            said = error.problems if isinstance(error, RecipeError) else [str(error)]
            self.problems += [problem for problem in said if problem not in self.problems]
            return None


def check_training(recipe: Recipe, world_size: int, run_dir: Path, fork: bool) -> list[str]:
    """Everything that is known to stop such a run at its start, one line each; empty: nothing."""
    found = Findings()
    newest = next(iter(reading.candidates(run_dir / "checkpoints")), None)
    state = found.of(reading.read_state, newest) if newest else None
    task, shards = found.of(build_task, recipe), found.of(training_shards, recipe.data)
    steps = found.of(_check_steps, recipe, task, shards, world_size, state)
    found.of(_check_deepspeed, recipe, world_size, steps)
    if recipe.data.val is not None:
        found.of(validation_shards, recipe.data)
    found.of(_check_writable, run_dir)
    if newest is None and recipe.model.weights is not None:
        found.of(_check_weights, Path(recipe.model.weights))
    if state is not None and not fork:
        found.of(_check_same_run, run_dir, state, recipe, shards)
    return found.problems


def check_evaluation(run_dir: Path, overrides: list[str]) -> list[str]:
    """The same for `dsmim evaluate` of a run directory or a checkpoint."""
    found = Findings()
    recipe = found.of(_recipe_of_run, run_dir, overrides)
    if recipe is not None:
        found.of(build_task, recipe)
        found.of(validation_shards, recipe.data)
    found.of(_check_writable, run_dir)
    return found.problems


def _check_steps(
    recipe: Recipe, task: Task | None, shards: list[ShardIndex] | None, world_size: int, state: dict[str, Any] | None
) -> int | None:
    """Micro batches per rank and step, where that can be told; without a task or shards only the batch is checked."""
    if task is not None and shards is not None:
        order = training_order(recipe, shards)
        return plan(recipe, task, order.epoch_samples, world_size, state).accumulation
    if state is None:
        return accumulation_steps(recipe.batch.global_batch, recipe.batch.micro_batch, world_size)
    return None


def _check_deepspeed(recipe: Recipe, world_size: int, steps: int | None) -> None:
    load_ds_config(recipe.engine.deepspeed, owned_keys(recipe, world_size, steps))


def _check_writable(run_dir: Path) -> None:
    """Try it in the nearest folder that is there: permission bits tell nothing of a read-only or full file system."""
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise ValueError(f"{run_dir}: cannot be written ({there}: {error.strerror})") from None


def _check_weights(path: Path) -> None:
    """Whether they are there; the job reads them."""
    if path.is_dir():
        if not (path / reading.MANIFEST).is_file() and not (
            reading.candidates(path / "checkpoints") or reading.candidates(path)
        ):
            raise ValueError(f"model.weights: {path} holds no checkpoint")
    elif not path.is_file():
        raise ValueError(f"model.weights: {path}: no such file or run directory")
    elif path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"model.weights: {path} is none of {', '.join(('.safetensors', *PICKLED))}")
    elif not os.access(path, os.R_OK):
        raise ValueError(f"model.weights: {path} cannot be read")


def _check_same_run(run_dir: Path, state: dict[str, Any], recipe: Recipe, shards: list[ShardIndex] | None) -> None:
    data = state["data_fingerprint"] if shards is None else fingerprint(shards)
    if changes := changes_of(state, recipe, data):
        raise ValueError(
            f"{run_dir}: the run was started with another recipe ({'; '.join(changes)}); use another "
            "--run-dir, restore the recipe, or go on with the new one by --fork"
        )


def _recipe_of_run(path: Path, overrides: list[str]) -> Recipe:
    itself = [path] if (path / reading.STATE).is_file() else []
    newest = next(iter([*itself, *reading.candidates(path / "checkpoints")]), None)
    if newest is None:
        raise ValueError(f"{path}: holds no checkpoint")
    return recipe_of(newest, overrides)

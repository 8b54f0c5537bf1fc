"""What a training run needs before its first step, opened in three stages: its data, its run directory, its engine.

Each stage succeeds on every rank or raises Stopped on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsmim.checkpoint.resume import resume_engine
from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.data.checks import check_data
from dsmim.data.dataset import EvalDataset, TarDataset
from dsmim.data.from_recipe import identity, open_reader, training_shards
from dsmim.data.order import training_order
from dsmim.engine.optim import check_patterns
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine
from dsmim.evaluate import open_validation
from dsmim.log import Log, counted
from dsmim.plan import Plan, plan
from dsmim.recipe import Recipe
from dsmim.tasks import Task, build_task
from dsmim.weights.files import unfinished, warm_start
from dsmim.weights.match import State
from dsmim.weights.pixels import normalisation_note


@dataclass(frozen=True)
class RunData:
    """The samples of a run."""

    train: TarDataset
    validation: EvalDataset | None
    identity: dict[str, str]
    """What decides the training samples besides the recipe, see dsmim.data.from_recipe."""
    notes: list[str]
    """What the log should say about the samples."""


@dataclass(frozen=True)
class Run:
    """An opened run directory, the recipe in steps and micro batches, and the log."""

    directory: RunDirectory
    plan: Plan
    log: Log


@dataclass(frozen=True)
class Session:
    """All that training needs: one session of a run, from its start or a resume to its end or the next interruption."""

    recipe: Recipe
    runtime: Runtime
    task: Task
    data: RunData
    run: Run
    engine: Engine

    def consumed(self, done: int) -> int:
        """Return the training samples that the run has consumed after `done` completed steps."""
        directory = self.run.directory
        return directory.consumed + (done - directory.step) * self.recipe.batch.global_batch

    def close(self) -> None:
        """Close the engine and the shards: in a notebook the process outlives the run."""
        self.engine.close()
        for data in filter(None, (self.data.train, self.data.validation)):
            data.reader.close()

    def headline(self) -> str:
        """Describe the run in one line."""
        runtime, plan, engine = self.runtime, self.run.plan, self.engine
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.task.model.parameters()]
        parameters, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
        frozen = f" ({trained / 1e6:.2f} M trained)" if trained < parameters else ""
        return (
            f"{self.recipe.name}: {parameters / 1e6:.2f} M parameters{frozen}, "
            f"ZeRO stage {engine.stage}, {engine.precision}, "
            f"{counted(runtime.world_size, 'rank')} by {runtime.place.launcher} on {runtime.device.type}, "
            f"{counted(self.data.train.order.samples, 'sample')}, batch {self.recipe.batch.global_batch} "
            f"({counted(plan.accumulation, 'micro batch', 'micro batches')} of {plan.micro_batch} per rank), "
            f"steps {self.run.directory.step} to {plan.rate.total}"
        )


def open_data(recipe: Recipe, runtime: Runtime) -> tuple[Task, RunData]:
    """Build the task and open the samples that it reads. Collective."""
    torch.manual_seed(recipe.seed)  # timm initialises its networks here; ours are initialised in build_engine
    with runtime.all_or_none():
        task = build_task(recipe)
        train = training_data(recipe, task, runtime)
        validation = open_validation(recipe, task, runtime) if recipe.data.val is not None else None
        shards = train.reader.shards, None if validation is None else validation.reader.shards
        notes = runtime.on_rank_zero(lambda: check_data(recipe, *shards))
    return task, RunData(train, validation, identity(recipe.data, train.reader.shards), notes)


def training_data(recipe: Recipe, task: Task, runtime: Runtime) -> TarDataset:
    """Return the recipe's training samples in their order. Collective.

    Rank 0 opens the index files for all ranks, to spare the file system's metadata server. Raises Stopped when shards
    or index files are missing.
    """
    with runtime.all_or_none():
        shards = runtime.on_rank_zero(lambda: training_shards(recipe.data))
        reader = open_reader(recipe.data, shards, recipe.data.shuffle_window)
        order = training_order(recipe, shards)
    return TarDataset(reader, order, task.train_sample, task.classes)


def open_run(recipe: Recipe, directory: RunDirectory, task: Task, data: RunData, runtime: Runtime, fork: bool) -> Run:
    """Lock the run directory, find the checkpoint to resume from, and plan the steps. Collective.

    fork: allow a recipe that differs from the one the run was started with.
    """
    with runtime.all_or_none():
        directory.open(recipe, data.identity, runtime, fork)
        state = directory.state if directory.resume_from else None
        steps = plan(recipe, task, data.train.order.epoch_samples, runtime.world_size, state)
        log = Log(
            directory.path, runtime.is_rank_zero, directory.step, steps.rate.total, recipe.log.tensorboard,
            directory.validation_due,
        )  # fmt: skip
    for note in (*directory.notes, *data.notes):
        log.say(note)
    log.say(f"images: {task.normalise.channels} channels, normalised by {task.normalise}")
    return Run(directory, steps, log)


def build_engine(recipe: Recipe, task: Task, run: Run, runtime: Runtime) -> Engine:
    """Create the model's parameters under DeepSpeed and load the checkpoint to resume from, if any. Collective."""
    weights = _initial_weights(recipe, task, run, runtime)
    torch.manual_seed(recipe.seed)
    with runtime.all_or_none():
        if run.directory.resume_from is None:
            check_patterns(task.model, recipe.optim)
        engine = Engine(
            task.model, task.layers, recipe, runtime, run.plan.accumulation, run.plan.rate, task.fill(weights)
        )
    runtime.set_timeout(recipe.engine.timeout_minutes)  # again, for the process groups that DeepSpeed has made
    if run.directory.resume_from is not None:
        resume_engine(run.directory, engine, runtime, run.log.say)
        run.log.say(f"resumed from {run.directory.resume_from}")
    runtime.on_rank_zero(lambda: run.directory.write_recipe(recipe))
    return engine


def _initial_weights(recipe: Recipe, task: Task, run: Run, runtime: Runtime) -> State | None:
    """Read what a new run starts from, on rank 0 alone: its parameters are broadcast when the engine is built."""
    settings = recipe.model
    if run.directory.resume_from is not None or settings.weights is None:
        return None
    with runtime.all_or_none():
        report, weights, note, early = None, None, None, None
        if runtime.is_rank_zero:
            report, weights = warm_start(task.model, settings.weights, settings.weights_head)
            note = normalisation_note(Path(settings.weights), report.layout, task.normalise)
            early = unfinished(Path(settings.weights))
    run.log.say(f"weights from {settings.weights}: {report}")
    if early:
        run.log.say(f"model.weights: {early}: the weights are not those of its end")
    if note:
        run.log.say(note)
    return weights

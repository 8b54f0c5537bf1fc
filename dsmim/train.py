"""The training loop: one for every task.

Which samples a step sees, its learning rate and its random stream are functions of the step alone, so that stopping
and going on changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmim.data.dataset import EvalDataset, TarDataset
from dsmim.data.from_recipe import open_reader, training_shards
from dsmim.data.index import fingerprint
from dsmim.data.loader import train_loader
from dsmim.data.order import accumulation_steps, stream_key, training_order
from dsmim.engine import checkpoint
from dsmim.engine.run_directory import RunDirectory, open_run
from dsmim.engine.runtime import Runtime, joined
from dsmim.engine.schedule import LearningRate, resolve
from dsmim.engine.watch import Watch
from dsmim.engine.zero import Engine, StepResult
from dsmim.evaluate import open_validation, to_device, validate
from dsmim.log import Clock, Log
from dsmim.models.weights import State
from dsmim.recipe import Duration, Recipe
from dsmim.tasks import Task, build_task
from dsmim.weights_file import warm_start


def fit(recipe: Recipe, run_dir: Path, fork: bool = False) -> None:
    """Train, or go on training, what the recipe says, in run_dir.

    Every rank calls it. Raises ValueError (Stopped where all ranks know) for what a user can mend.
    """
    with joined(recipe.engine.timeout_minutes) as runtime:
        _Training(recipe, run_dir, fork, runtime).run()


def training_data(recipe: Recipe, task: Task, runtime: Runtime) -> TarDataset:
    """The recipe's training samples in their order. Collective: rank 0 opens the indexes for all, because a metadata
    server would not bear every rank's doing so. Raises ValueError when shards or indexes are missing."""
    shards = runtime.on_first(lambda: training_shards(recipe.data))
    reader = runtime.together(lambda: open_reader(recipe.data, shards, recipe.data.shuffle_window))
    order = runtime.together(lambda: training_order(recipe, shards))
    return TarDataset(reader, order, task.train_sample, task.classes)


@dataclass
class _Cadence:
    """Every how many steps something happens."""

    every: int
    total: int

    def __call__(self, done: int) -> bool:
        return done == self.total or (self.every > 0 and done % self.every == 0)


class _Training:
    """One session of a run: set up in __init__, then run()."""

    def __init__(self, recipe: Recipe, run_dir: Path, fork: bool, runtime: Runtime):
        self.recipe, self.runtime = recipe, runtime
        torch.manual_seed(recipe.seed)  # networks of timm are initialised here, ours when the engine takes them
        self.task = runtime.together(lambda: build_task(recipe))
        self.data = training_data(recipe, self.task, runtime)
        self.validation: EvalDataset | None = None
        if recipe.data.val is not None:
            self.validation = open_validation(recipe, self.task, runtime)
        batch, epoch = recipe.batch, self.data.order.epoch_samples
        self.accumulation: int = runtime.together(
            lambda: accumulation_steps(batch.global_batch, batch.micro_batch, runtime.world_size)
        )
        micro = batch.global_batch // (runtime.world_size * self.accumulation)
        runtime.together(lambda: self.task.check_micro_batch(micro))
        self.rate: LearningRate = runtime.together(
            lambda: resolve(recipe.schedule, recipe.optim, batch.global_batch, epoch)
        )
        self.fingerprint = fingerprint(self.data.reader.shards)
        self.run_dir: RunDirectory = open_run(run_dir, recipe, self.fingerprint, runtime, fork)
        self.log = Log(run_dir, runtime.is_first, self.run_dir.step, self.rate.total, recipe.log.tensorboard)
        for note in self.run_dir.notes:
            self.log.say(note)
        weights = self._read_weights()
        torch.manual_seed(recipe.seed)
        self.engine: Engine = runtime.together(
            lambda: Engine(
                self.task.model, self.task.layers, recipe, runtime, self.accumulation, self.rate,
                self.task.fill(weights),
            )
        )  # fmt: skip
        self.watch = Watch(recipe, runtime, self.log.say, epoch)

    def run(self) -> None:
        """Train from where the run stands to its end."""
        first, total = self._resume(), self.rate.total
        if first >= total:
            self.log.say(f"{self.run_dir.path}: complete at step {first} of {total}")
            self._close()
            return
        validating, saving, logging = (self._cadence(c) for c in self._cadences())
        batches = iter(self._batches(total - first))
        self.log.say(self._headline(first))
        clock = Clock()
        for step in range(first, total):
            torch.manual_seed(stream_key(self.recipe.seed, "model", step, self.runtime.rank))
            loss, result, bad = self._step(step, batches, clock)
            done = step + 1
            if logging(done):
                self.log.step(done, self._figures(loss, result, bad, clock))
            if self.validation and validating(done):
                figures = validate(self.engine, self.task, self.validation, self.recipe, self.runtime)
                self.log.validation(done, figures)
            if saving(done):
                self._save(done)
            if logging(done) or validating(done) or saving(done):
                clock.restart()  # so that neither validation nor saving counts as training time
        self._close()

    def _close(self) -> None:
        self.log.close()
        self.engine.close()

    def _step(self, step: int, batches: Any, clock: Clock) -> tuple[float, StepResult, int]:
        """One optimizer step: the global batch's mean loss, what was done, undecodable images so far."""
        self.engine.train()
        losses, keys = torch.zeros(2, dtype=torch.float64, device=self.runtime.device), []
        for _ in range(self.accumulation):
            with clock.waiting():
                batch = next(batches)
            keys += batch["key"]
            losses[1] += self.watch.undecodable(batch)
            batch = to_device(batch, self.runtime.device) | {"step": step}
            loss = self.task.training_loss(self.engine, batch)
            self.engine.backward(loss)
            losses[0] += loss.detach().double() / (self.accumulation * self.runtime.world_size)
        own = float(losses[0])
        total, faults = self.runtime.sum(losses).tolist()
        bad = self.watch.count(int(faults), self.recipe.batch.global_batch)
        result = self.engine.step(step)
        clock.steps += 1
        self.watch.finite(step, total, own, result, keys)
        return total, result, bad

    def _figures(self, loss: float, result: StepResult, bad: int, clock: Clock) -> dict[str, float]:
        speed = clock.read(self.recipe.batch.global_batch)
        return {"loss": loss, "lr": result.lr, "grad_norm": result.grad_norm, "undecodable": bad, **speed}

    def _resume(self) -> int:
        """Load the checkpoint that the run goes on from, if there is one. Gives the completed steps."""
        run = self.run_dir
        if run.resume_from is not None:
            self.runtime.together(lambda: self._check_stage(run.state["zero_stage"]))
            self.runtime.together(lambda: self.engine.restore(run.resume_from))
            self.watch.restore(run.state["watch"])
            self.log.say(f"resumed from {run.resume_from}")
        return run.step

    def _check_stage(self, saved: int) -> None:
        if saved != self.engine.stage:
            raise ValueError(
                f"engine.deepspeed: the checkpoint was written at ZeRO stage {saved}, {self.recipe.engine.deepspeed} "
                f"is stage {self.engine.stage}; go on with stage {saved}"
            )

    def _save(self, done: int) -> None:
        state = {
            "samples_consumed": self._consumed(done),
            "data_fingerprint": self.fingerprint,
            "world_size": self.runtime.world_size,
            "zero_stage": self.engine.stage,
            "watch": self.watch.state(),
            "recipe": self.recipe.model_dump(mode="json"),
        }
        keep = self.recipe.checkpoint.keep
        checkpoint.save(self.engine, self.run_dir.checkpoints, done, state, keep, self.runtime)

    def _consumed(self, done: int) -> int:
        return self.run_dir.consumed + (done - self.run_dir.step) * self.recipe.batch.global_batch

    def _batches(self, steps: int) -> Any:
        runtime, recipe = self.runtime, self.recipe
        return train_loader(
            self.data, self.run_dir.consumed, steps, recipe.batch.global_batch, self.accumulation,
            runtime.world_size, runtime.rank, recipe.data.workers, pin=runtime.device.type == "cuda",
        )  # fmt: skip

    def _read_weights(self) -> State | None:
        """What a new run starts from: rank 0 reads it, and everybody gets rank 0's parameters."""
        settings = self.recipe.model
        if self.run_dir.resume_from is not None or settings.weights is None:
            return None
        model, first = self.task.model, self.runtime.is_first
        read = self.runtime.together(
            lambda: warm_start(model, settings.weights, settings.weights_head) if first else (None, None)
        )
        self.log.say(f"weights from {settings.weights}: {read[0]}")
        return read[1]

    def _cadences(self) -> tuple[Duration, ...]:
        recipe = self.recipe
        return recipe.validation.every, recipe.checkpoint.every, Duration(steps=recipe.log.every)

    def _cadence(self, every: Duration) -> _Cadence:
        steps = every.in_steps(self.recipe.batch.global_batch, self.data.order.epoch_samples)
        return _Cadence(steps, self.rate.total)

    def _headline(self, first: int) -> str:
        runtime, engine, order = self.runtime, self.engine, self.data.order
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.model.parameters())
        return (
            f"{self.recipe.name}: {parameters / 1e6:.2f} M parameters, ZeRO stage {engine.stage}, {engine.precision}, "
            f"{runtime.world_size} ranks by {runtime.place.launcher} on {runtime.device.type}, "
            f"{order.samples} samples, batch {self.recipe.batch.global_batch} ({self.accumulation} micro batches per "
            f"rank), steps {first} to {self.rate.total}"
        )

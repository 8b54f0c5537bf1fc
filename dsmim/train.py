"""The training loop: one for every task.

Which samples a step sees, its learning rate and its random stream are functions of the step alone, so that stopping
and going on changes nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsmim.checkpoint.resume import resume_engine
from dsmim.checkpoint.run_directory import RunDirectory, open_run
from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.checkpoint.saving import Saver
from dsmim.cluster.slurm import end_of_job
from dsmim.data.dataset import EvalDataset, TarDataset
from dsmim.data.from_recipe import open_reader, training_shards
from dsmim.data.loader import train_loader
from dsmim.data.order import stream_key, training_order
from dsmim.engine.limits import FaultLimits
from dsmim.engine.runtime import Runtime, joined
from dsmim.engine.zero import Engine, StepResult
from dsmim.evaluate import open_validation, to_device, validate
from dsmim.health import replay
from dsmim.health.host import merge
from dsmim.health.interrupt import Interrupt
from dsmim.health.outcome import Stopped
from dsmim.log import Clock, Log
from dsmim.plan import Plan, plan
from dsmim.recipe import Recipe
from dsmim.shards.index import fingerprint
from dsmim.tasks import Task, build_task
from dsmim.tasks.base import Batch
from dsmim.weights.files import warm_start
from dsmim.weights.match import State


def fit(recipe: Recipe, run_dir: Path, fork: bool = False, interrupt: Interrupt | None = None) -> bool:
    """Train, or go on training, what the recipe says, in run_dir. False: stopped before its end by `interrupt`, or by
    the approaching end of the job, with everything saved.

    Every rank calls it. Raises ValueError (Stopped where all ranks know) for what a user can mend, and LostPeer.
    """
    with joined(recipe.engine.timeout_minutes, recipe.log.low_memory) as runtime:
        training = _Training(recipe, run_dir, fork, runtime, interrupt or Interrupt())
        try:
            return training.run()
        except Stopped:
            training.saver.finish()  # what is being written may be the newest good checkpoint
            raise


def training_data(recipe: Recipe, task: Task, runtime: Runtime) -> TarDataset:
    """The recipe's training samples in their order. Collective: rank 0 opens the indexes for all, because a metadata
    server would not bear every rank's doing so. Raises ValueError when shards or indexes are missing."""
    shards = runtime.on_rank_zero(lambda: training_shards(recipe.data))
    with runtime.all_or_none():
        reader = open_reader(recipe.data, shards, recipe.data.shuffle_window)
        order = training_order(recipe, shards)
    return TarDataset(reader, order, task.train_sample, task.classes)


class _Training:
    """One session of a run: set up in __init__, then run()."""

    def __init__(self, recipe: Recipe, run_dir: Path, fork: bool, runtime: Runtime, interrupt: Interrupt):
        self.recipe, self.runtime, self.interrupt = recipe, runtime, interrupt
        end = runtime.on_rank_zero(lambda: end_of_job(os.environ))
        interrupt.stop_before(end, recipe.checkpoint.before_end_minutes)  # each rank may be waiting for data by then
        torch.manual_seed(recipe.seed)  # networks of timm are initialised here, ours when the engine takes them
        with runtime.all_or_none():
            self.task = build_task(recipe)
            self.data = training_data(recipe, self.task, runtime)
        self.validation: EvalDataset | None = None
        if recipe.data.val is not None:
            self.validation = open_validation(recipe, self.task, runtime)
        self.fingerprint = fingerprint(self.data.reader.shards)
        self.run_dir: RunDirectory = open_run(run_dir, recipe, self.fingerprint, runtime, fork)
        state = self.run_dir.state if self.run_dir.resume_from else None
        with runtime.all_or_none():
            self.plan: Plan = plan(recipe, self.task, self.data.order.epoch_samples, runtime.world_size, state)
        self.log = Log(
            run_dir, runtime.is_rank_zero, self.run_dir.step, self.plan.rate.total, recipe.log.tensorboard,
            self.run_dir.validation_due,
        )  # fmt: skip
        for note in self.run_dir.notes:
            self.log.say(note)
        weights = self._read_weights()
        torch.manual_seed(recipe.seed)
        with runtime.all_or_none():
            self.engine: Engine = Engine(
                self.task.model, self.task.layers, recipe, runtime, self.plan.accumulation, self.plan.rate,
                self.task.fill(weights),
            )  # fmt: skip
        runtime.set_timeout(recipe.engine.timeout_minutes)  # in DeepSpeed's own groups too
        self.limits = FaultLimits(recipe, runtime, self.log.say, self.data.order.epoch_samples)
        self.saver = Saver(
            self.engine, self.run_dir.checkpoints, recipe.checkpoint, self.plan.keep_every,
            self.run_dir.step if self.run_dir.resume_from else None, runtime, self.log.say,
        )  # fmt: skip
        self.validated: tuple[int, dict[str, float]] | None = None

    def run(self) -> bool:
        """Train from where the run stands to its end; False when asked to stop before."""
        first, total = self._resume(), self.plan.rate.total
        due = self.validation and self.run_dir.validation_due
        if due and not self._validate(first):
            return self._stop(first, validation_due=True)
        if first >= total:
            self.log.say(f"{self.run_dir.path}: complete at step {first} of {total}")
            return self._close(complete=True)
        validating, saving, logging = self.plan.validating, self.plan.saving, self.plan.logging
        batches = iter(self._batches(total - first))
        self.log.say(self._headline(first))
        clock = Clock()
        for step in range(first, total):
            torch.manual_seed(stream_key(self.recipe.seed, "model", step, self.runtime.rank))
            micro_batches = self._fetch(step, batches, clock)
            if self._asked_to_stop():
                return self._stop(step)
            loss, result, bad = self._step(step, micro_batches, clock)
            done = step + 1
            if step == first:  # validation, which compiles for itself, and saving still may take longer
                self.runtime.set_timeout(self.recipe.engine.step_timeout_minutes)
            if logging(done):
                self._log(done, self._figures(loss, result, bad, clock))
            if self.validation and validating(done) and not self._validate(done):
                return self._stop(done, validation_due=True)
            if saving(done):
                self._save(done)
            if logging(done) or validating(done) or saving(done):
                clock.restart()  # so that neither validation nor saving counts as training time
        return self._close(complete=True)

    def _log(self, done: int, figures: dict[str, float]) -> None:
        """Collective: a disk that refuses the log stops all ranks."""
        host = merge(self.runtime.gather(self.runtime.host.sample()))
        with self.runtime.all_or_none():
            self.log.step(done, figures)
            self.log.host(done, host)

    def _close(self, complete: bool) -> bool:
        self.saver.finish()
        self.log.close()
        self.engine.close()
        return complete

    def _asked_to_stop(self) -> bool:
        """Whether any rank is; every rank learns it here. Publishes the checkpoint that all have written meanwhile."""
        stop, busy = self.runtime.any(self.interrupt.reason is not None, self.saver.busy)
        if not busy:
            self.saver.finish()
        return stop

    def _stop(self, done: int, validation_due: bool = False) -> bool:
        """Leave the run so that it can go on from `done` completed steps."""
        self.log.say(f"asked to stop: {self.interrupt.reason or 'another rank was'}")
        self.saver.finish()
        if done > 0 and self.saver.saved != done:
            self._save(done, validation_due)
        self.log.say(f"stopped at step {done} of {self.plan.rate.total} with everything saved; start again to go on")
        return self._close(complete=False)

    def _fetch(self, step: int, batches: Iterator[Batch], clock: Clock) -> list[Batch] | None:
        """The micro batches of a step, still in host memory; None when asked to stop meanwhile."""
        self.runtime.phase("waiting for data", step)
        with clock.waiting():
            found = [self.interrupt.fetch(batches) for _ in range(self.plan.accumulation)]
        self.runtime.phase("training", step)
        return None if any(batch is None for batch in found) else found

    def _step(self, step: int, micro_batches: list[Batch], clock: Clock) -> tuple[float, StepResult, int]:
        """One optimizer step: the global batch's mean loss, what was done, undecodable images so far."""
        self.engine.train()
        losses = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for micro_batch in micro_batches:
            losses[1] += self.limits.report_undecodable(micro_batch)
            batch = to_device(micro_batch, self.runtime.device) | {"step": step}
            loss = self.task.training_loss(self.engine, batch)
            self.engine.backward(loss)
            losses[0] += loss.detach().double() / (self.plan.accumulation * self.runtime.world_size)
        own = float(losses[0])
        total, faults = self.runtime.sum(losses).tolist()
        bad = self.limits.count_undecodable(int(faults), self.recipe.batch.global_batch)
        result = self.engine.step(step)
        clock.steps += 1
        if not (math.isfinite(total) and result.applied):
            self._keep_for_replay(step, micro_batches, own, total, result)
        self.limits.check_step(step, total, own, result, [key for batch in micro_batches for key in batch["key"]])
        return total, result, bad

    def _keep_for_replay(self, step: int, micro_batches: list[Batch], own: float, total: float, result: StepResult):
        """On the ranks whose loss is not finite; on all, when only the gradient is not."""
        if math.isfinite(own) and not math.isfinite(total):
            return
        rank, seed = self.runtime.rank, self.recipe.seed
        found = replay.write(self.run_dir.path / "replay", step, rank, micro_batches, {
            "loss": own, "grad_norm": result.grad_norm, "world_size": self.runtime.world_size, "seed": seed,
            "manual_seed": stream_key(seed, "model", step, rank), "first_position": self._consumed(step),
            "newest_checkpoint": self.saver.saved, "recipe": self.recipe.model_dump(mode="json"),
        })  # fmt: skip
        print(f"rank {rank}: kept for replay: {found}", file=sys.stderr, flush=True)

    def _figures(self, loss: float, result: StepResult, bad: int, clock: Clock) -> dict[str, float]:
        speed = clock.read(self.recipe.batch.global_batch)
        return {"loss": loss, "lr": result.lr, "grad_norm": result.grad_norm, "undecodable": bad, **speed}

    def _validate(self, done: int) -> bool:
        """Measure and log; False when asked to stop before the set's end."""
        with self.runtime.long_timeout():
            figures = validate(self.engine, self.task, self.validation, self.recipe, self.runtime, self.interrupt)
        if figures is None:
            return False
        self.validated = (done, figures)
        with self.runtime.all_or_none():
            self.log.validation(done, figures)
        return True

    def _resume(self) -> int:
        """Load the checkpoint that the run goes on from, if there is one. Gives the completed steps."""
        run = self.run_dir
        if run.resume_from is not None:
            resume_engine(run, self.engine, self.runtime, self.log.say)
            self.limits.load_state(run.state["watch"])
            self.log.say(f"resumed from {run.resume_from}")
        return run.step

    def _save(self, done: int, validation_due: bool = False) -> None:
        self.runtime.phase("saving", done)
        with self.runtime.all_or_none():
            self.log.sync()
        measured = self.validated is not None and self.validated[0] == done
        self.saver.save(done, {
            "samples_consumed": self._consumed(done),
            "data_fingerprint": self.fingerprint,
            "world_size": self.runtime.world_size,
            "zero_stage": self.engine.stage,
            "micro_batch": self.plan.micro_batch,
            PARAMETER_ORDER: [list(group.names) for group in self.engine.groups],
            "watch": self.limits.state(),
            "validation": self.validated[1] if measured else None,
            "validation_due": validation_due,
            "recipe": self.recipe.model_dump(mode="json"),
        })  # fmt: skip

    def _consumed(self, done: int) -> int:
        return self.run_dir.consumed + (done - self.run_dir.step) * self.recipe.batch.global_batch

    def _batches(self, steps: int) -> Any:
        runtime, recipe = self.runtime, self.recipe
        return train_loader(
            self.data, self.run_dir.consumed, steps, recipe.batch.global_batch, self.plan.accumulation,
            runtime.world_size, runtime.rank, recipe.data.workers, pin=runtime.device.type == "cuda",
        )  # fmt: skip

    def _read_weights(self) -> State | None:
        """What a new run starts from: rank 0 reads it, and everybody gets rank 0's parameters."""
        settings = self.recipe.model
        if self.run_dir.resume_from is not None or settings.weights is None:
            return None
        model, first = self.task.model, self.runtime.is_rank_zero
        with self.runtime.all_or_none():
            read = warm_start(model, settings.weights, settings.weights_head) if first else (None, None)
        self.log.say(f"weights from {settings.weights}: {read[0]}")
        return read[1]

    def _headline(self, first: int) -> str:
        runtime, engine, order = self.runtime, self.engine, self.data.order
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.model.parameters())
        return (
            f"{self.recipe.name}: {parameters / 1e6:.2f} M parameters, ZeRO stage {engine.stage}, {engine.precision}, "
            f"{runtime.world_size} ranks by {runtime.place.launcher} on {runtime.device.type}, "
            f"{order.samples} samples, batch {self.recipe.batch.global_batch} ({self.plan.accumulation} micro batches "
            f"of {self.plan.micro_batch} per rank), steps {first} to {self.plan.rate.total}"
        )

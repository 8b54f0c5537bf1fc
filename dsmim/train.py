"""The training loop: one for every task.

Which samples a step sees, its learning rate and its random stream are functions of the step alone, so that a resumed
run takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.checkpoint.saving import Saver
from dsmim.cluster.slurm import end_of_job
from dsmim.data.loader import end_workers, train_loader
from dsmim.data.order import stream_key
from dsmim.engine.limits import FaultLimits
from dsmim.engine.runtime import joined
from dsmim.evaluate import to_device, validate
from dsmim.health.host import merge
from dsmim.health.interrupt import Interrupt
from dsmim.health.outcome import NoProgress, Stopped
from dsmim.health.status import ENDING
from dsmim.log import Clock
from dsmim.models import PositionDraws
from dsmim.recipe import Recipe
from dsmim.record import Interval, Step, checkpoint_state, keep_for_replay
from dsmim.session import Session, build_engine, open_data, open_run
from dsmim.tasks.base import Batch


def fit(recipe: Recipe, run_dir: str | Path, fork: bool = False, interrupt: Interrupt | None = None) -> bool:
    """Train the recipe in run_dir, or resume the run that is there. Every rank calls it.

    Return True when the run is complete; False when `interrupt`, or the approaching end of the job, stopped it after at
    least one step, with everything saved. Raises NoProgress when it was stopped before that, ValueError (Stopped where
    all ranks know of it) for what a user can fix, and LostPeer when another rank does not answer.
    """
    limits = (recipe.engine.timeout_minutes, recipe.log.low_memory)
    with RunDirectory(Path(run_dir)) as directory, joined(*limits) as runtime, interrupt or Interrupt() as interrupt:
        runtime.monitor.watch_peers(lambda: interrupt.signalled)
        end = runtime.on_rank_zero(lambda: end_of_job(os.environ))
        interrupt.stop_before(end, recipe.checkpoint.before_end_minutes)
        recipe = runtime.on_rank_zero(lambda: directory.completed(recipe))
        task, data = open_data(recipe, runtime)
        run = open_run(recipe, directory, task, data, runtime, fork)
        engine = build_engine(recipe, task, run, runtime)
        return _Training(Session(recipe, runtime, task, data, run, engine), interrupt).run()


class _Training:
    """The steps of one session."""

    def __init__(self, session: Session, interrupt: Interrupt):
        self.session, self.interrupt, run = session, interrupt, session.run
        self.recipe, self.runtime, self.task, self.data = session.recipe, session.runtime, session.task, session.data
        self.engine, self.directory, self.plan, self.log = session.engine, run.directory, run.plan, run.log
        self.saver = Saver(
            self.engine, self.directory.checkpoints, self.recipe.checkpoint, self.plan.keep_every,
            self.directory.saved, self.runtime, self.log.say,
        )  # fmt: skip
        self.limits = FaultLimits(self.recipe, self.runtime, self.log.say, self.data.train.order.epoch_samples)
        if self.directory.resume_from is not None:
            self.limits.load_state(self.directory.state["watch"])
        self.drop_path = PositionDraws(
            self.task.model, stream_key(self.recipe.seed, "drop path"), self.recipe.batch.global_batch,
            self.runtime.device, self.recipe.model.drop_path == "balanced",
        )  # fmt: skip
        self.interval = Interval(self.directory.state.get("interval"))
        self.clock = Clock()
        self.batches: Iterator[Batch] = iter(())
        self.validated: tuple[int, dict[str, float]] | None = None

    def run(self) -> bool:
        """Train to the end of the run. A checkpoint that is being written when all ranks stop is still published."""
        together = self.runtime.world_size == 1
        try:
            stopped_at = self._train()
            self.saver.finish()
            together = True
            return stopped_at is None
        except Stopped:
            self.saver.finish()  # does nothing if it raised this
            together = True
            raise
        finally:
            self._close(together)

    def _close(self, together: bool) -> None:
        """Close what the session has opened.

        together: every rank is here. After an error of one of several ranks the engine might wait for a failed rank,
        and the launcher ends the processes: close the log alone.
        """
        self.log.close()
        if together:
            self.runtime.phase(ENDING)
            end_workers(self.batches)
            self.session.close()

    def _train(self) -> int | None:
        """Take the steps that are left. Return None at the run's end, or the completed steps when asked to stop."""
        first, total = self.directory.step, self.plan.rate.total
        if self.directory.validation_due and self.data.validation:
            if not self._validate(first):
                return self._stop(first, validation_due=True)
            self.saver.add_validation(first, self.validated[1])
        if first >= total:
            self.log.say(f"{self.directory.path}: complete at step {first} of {total}")
            return None
        self.log.say(self.session.headline())
        if self.drop_path.note:
            self.log.say(self.drop_path.note)
        batches = self.batches = self._batches(total - first)
        self.clock.restart()
        for step in range(first, total):
            micro_batches = self._fetch(step, batches)
            stop, due = self._agree()
            if stop:
                return self._stop(step)
            if due and step > first:
                self._save(step)
                self.runtime.phase("training", step)
                self.clock.restart()
            result = self._step(step, micro_batches)
            self.interval.add(result)
            done = step + 1
            if step == first:  # it may compile and autotune; validation and saving keep the longer timeout
                self.runtime.set_timeout(self.recipe.engine.step_timeout_minutes)
            if self.plan.logging(done):
                self._log(done, result)
            if self.plan.validating(done) and self.data.validation and not self._validate(done):
                return self._stop(done, validation_due=True)
            if self.plan.saving(done) or self._is_best(done):
                self._save(done)
            if self.plan.logging(done) or self.plan.validating(done) or self.plan.saving(done):
                self.clock.restart()  # neither validation nor saving counts as training time
        return None

    def _step(self, step: int, micro_batches: list[Batch]) -> Step:
        """Take one optimizer step: forward and backward of each micro batch, then the update."""
        torch.manual_seed(stream_key(self.recipe.seed, "model", step, self.runtime.rank))
        self.engine.train()
        loss = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for micro_batch in micro_batches:
            batch = to_device(micro_batch, self.runtime.device) | {"step": step, "position": micro_batch["position"]}
            with self.drop_path.at(batch["position"]):
                micro_loss = self.task.training_loss(self.engine, batch)
                self.engine.backward(micro_loss)
            loss += micro_loss.detach().double() / (self.plan.accumulation * self.runtime.world_size)
        own_loss = float(loss)
        faults = sum(self.limits.report_undecodable(micro_batch) for micro_batch in micro_batches)
        total_loss, faults = self.runtime.sum(torch.stack([loss, torch.full_like(loss, faults)])).tolist()
        undecodable = self.limits.count_undecodable(int(faults), self.recipe.batch.global_batch)
        update = self.engine.step(step)
        self.clock.stepped()
        result = Step(total_loss, own_loss, update, undecodable)
        if not result.finite:
            keep_for_replay(self.session, step, micro_batches, result, self.saver.saved)
        self.limits.check_step(
            step, total_loss, own_loss, update, [key for batch in micro_batches for key in batch["key"]]
        )
        return result

    def _batches(self, steps: int) -> Iterator[Batch]:
        runtime, recipe = self.runtime, self.recipe
        return iter(train_loader(
            self.data.train, self.directory.consumed, steps, recipe.batch.global_batch, self.plan.accumulation,
            runtime.world_size, runtime.rank, recipe.data.workers, pin=runtime.device.type == "cuda",
        ))  # fmt: skip

    def _fetch(self, step: int, batches: Iterator[Batch]) -> list[Batch] | None:
        """Return the micro batches of a step, still in host memory; None when this rank is asked to stop meanwhile."""
        self.runtime.phase("waiting for data", step)
        with self.clock.waiting():
            found = [self.interrupt.fetch(batches) for _ in range(self.plan.accumulation)]
        self.runtime.phase("training", step)
        return None if any(batch is None for batch in found) else found

    def _log(self, done: int, result: Step) -> None:
        """Write the figures of the steps since the last line. Collective: a disk that refuses them stops all ranks."""
        host = merge(self.runtime.gather(self.runtime.host.sample()))
        with self.runtime.all_or_none():
            speed = self.clock.read(self.recipe.batch.global_batch)
            self.log.step(done, self.interval.read(result) | speed, self.clock.seconds_per_step)
            self.log.host(done, host)

    def _validate(self, done: int) -> bool:
        """Measure and log the validation set; return False when asked to stop before its end."""
        with self.runtime.long_timeout():
            figures = self._measure()
        if figures is None:
            return False
        self.validated = (done, figures)
        with self.runtime.all_or_none():
            self.log.validation(done, figures)
        return True

    def _measure(self) -> dict[str, float] | None:
        """Return the figures of the weights, and with validation.ema those of their moving average too, as ema_…; None
        when asked to stop."""

        def figures() -> dict[str, float] | None:
            return validate(self.engine, self.task, self.data.validation, self.recipe, self.runtime, self.interrupt)

        own = figures()
        if own is None or not self.recipe.validation.ema:
            return own
        with self.engine.averaged():
            averaged = figures()
        return averaged and own | {f"ema_{name}": averaged[name] for name in self.recipe.task.figures}

    def _save(self, done: int, validation_due: bool = False) -> None:
        self.runtime.phase("saving", done)
        with self.runtime.all_or_none():
            self.log.sync()
        measured = self.validated[1] if self.validated and self.validated[0] == done else None
        loop_state = {
            "watch": self.limits.state(), "interval": self.interval.state(), "validation": measured,
            "validation_due": validation_due,
        }  # fmt: skip
        self.saver.save(done, checkpoint_state(self.session, done) | loop_state)

    def _is_best(self, done: int) -> bool:
        """Return whether the run was validated at this step, better than ever before. Collective."""
        return self.validated is not None and self.validated[0] == done and self.saver.is_best(self.validated[1])

    def _agree(self) -> tuple[bool, bool]:
        """Return whether any rank is asked to stop, and whether the clock asks for a checkpoint; publish the one that
        all ranks have written meanwhile."""
        stop, busy, due = self.runtime.any(self.interrupt.reason is not None, self.saver.busy, self.saver.due)
        if not busy:
            self.saver.finish()
        return stop, due and not busy

    def _stop(self, done: int, validation_due: bool = False) -> int:
        """Save a checkpoint of `done` completed steps, so that the run can resume from there.

        Raises NoProgress when the session has not taken a step.
        """
        asked = self.interrupt.reason or "another rank was"
        self.log.say(f"asked to stop: {asked}")
        self.saver.finish()
        if done == self.directory.step:
            raise NoProgress(
                f"asked to stop ({asked}) before the first step of this session; the run is still at step {done} of "
                f"{self.plan.rate.total}. Start the same command again to continue. If its start and the first step "
                "take longer than the job, give the job more time (--time), or reduce checkpoint.before_end_minutes"
            )
        if done > 0 and self.saver.saved != done:
            self._save(done, validation_due)
            self.saver.finish()  # with checkpoint.background it is still being written
        self.log.say(
            f"stopped at step {done} of {self.plan.rate.total} with everything saved; start the same command again to "
            "resume"
        )
        return done

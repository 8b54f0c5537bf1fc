"""What steps leave on disk beside the log: a checkpoint's state, and the micro batches of a step that went wrong."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from dsmim.checkpoint.recorded_paths import STARTED_IN
from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.data.order import stream_key
from dsmim.engine.zero import StepResult
from dsmim.health import replay
from dsmim.session import Session
from dsmim.tasks.base import Batch


@dataclass(frozen=True)
class Step:
    """What one training step gave."""

    loss: float
    """Mean loss of the global batch."""
    own_loss: float
    """This rank's contribution to it."""
    update: StepResult
    undecodable: int
    """Images that could not be decoded, since the run's beginning."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were, so that the update was applied."""
        return math.isfinite(self.loss) and self.update.applied

    def figures(self) -> dict[str, float]:
        """Return what the log shows of it."""
        return {"loss": self.loss, "lr": self.update.lr, "grad_norm": self.update.grad_norm,
                "undecodable": self.undecodable}  # fmt: skip


class Interval:
    """The steps since the last line of the log. A checkpoint keeps it, so that a resumed run writes the same lines as
    one that was never interrupted."""

    def __init__(self, state: dict[str, Any] | None = None):
        """state: that of a checkpoint; None: the interval begins here."""
        begun = {"loss_sum": 0.0, "applied": 0, "skipped": 0} | (state or {})
        self.loss_sum, self.applied, self.skipped = begun["loss_sum"], begun["applied"], begun["skipped"]

    def state(self) -> dict[str, Any]:
        """Return what a resumed run continues with."""
        return {"loss_sum": self.loss_sum, "applied": self.applied, "skipped": self.skipped}

    def add(self, step: Step) -> None:
        """Count a step. Skipped ones, whose loss or gradient was not finite, have no share in the mean."""
        if step.finite:
            self.loss_sum, self.applied = self.loss_sum + step.loss, self.applied + 1
        else:
            self.skipped += 1

    def read(self, newest: Step) -> dict[str, float]:
        """Return the line's figures, and begin the next interval.

        `loss` is the mean of the interval's applied steps (if there are none, that of the newest step), `skipped` the
        number of the others, if there are any. The rest is the newest step's.
        """
        mean = {"loss": self.loss_sum / self.applied} if self.applied else {}
        skipped = {"skipped": self.skipped} if self.skipped else {}
        self.loss_sum, self.applied, self.skipped = 0.0, 0, 0
        return newest.figures() | mean | skipped


def checkpoint_state(session: Session, done: int) -> dict[str, Any]:
    """Return what state.json records of a session after `done` completed steps, besides figures of the loop itself."""
    return {
        "samples_consumed": session.consumed(done),
        **session.data.identity,
        STARTED_IN: session.run.directory.started_in,
        "world_size": session.runtime.world_size,
        "zero_stage": session.engine.stage,
        "micro_batch": session.run.plan.micro_batch,
        PARAMETER_ORDER: [list(group.names) for group in session.engine.groups],
        "recipe": session.recipe.model_dump(mode="json"),
    }


def keep_for_replay(session: Session, step: int, micro_batches: list[Batch], result: Step, saved: int | None) -> None:
    """Keep the micro batches of a step that was not finite, on the ranks whose loss was not; on all ranks when only
    the gradient was not. saved: the step of the newest checkpoint."""
    if math.isfinite(result.own_loss) and not math.isfinite(result.loss):
        return
    rank, seed = session.runtime.rank, session.recipe.seed
    found = replay.write(session.run.directory.path / "replay", step, rank, micro_batches, {
        "loss": result.own_loss, "grad_norm": result.update.grad_norm, "world_size": session.runtime.world_size,
        "seed": seed, "manual_seed": stream_key(seed, "model", step, rank),
        "first_position": session.consumed(step), "newest_checkpoint": saved,
        "recipe": session.recipe.model_dump(mode="json"),
    })  # fmt: skip
    print(f"rank {rank}: kept for replay: {found}", file=sys.stderr, flush=True)

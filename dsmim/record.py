"""What steps leave on disk beside the log: a checkpoint's state, and the micro batches of a step that went wrong."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.data.decode import decoder_name
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


def checkpoint_state(session: Session, done: int) -> dict[str, Any]:
    """Return what state.json records of a session after `done` completed steps, besides figures of the loop itself."""
    return {
        "samples_consumed": session.consumed(done),
        "data_fingerprint": session.data.fingerprint,
        "decoder": decoder_name(),
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

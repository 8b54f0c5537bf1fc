"""What must not pass unnoticed in training: undecodable images, losses that are not finite or that diverge."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import StepResult
from dsmim.health.outcome import Stopped
from dsmim.recipe import Recipe

LOSSES = 20  # steps over which a loss is averaged before it is judged


class Watch:
    """Counts faults and stops the run, on all ranks together, beyond the recipe's limits.

    say: where rank 0 reports; epoch_samples: the smallest number of samples a share is taken of.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, say: Callable[[str], None], epoch_samples: int):
        self.max_share, self.max_skipped = recipe.data.max_undecodable, recipe.engine.max_skipped
        self.max_growth = recipe.engine.max_loss_growth
        self.first: list[float] = []
        self.last: list[float] = []
        self.runtime, self.say, self.epoch_samples = runtime, say, epoch_samples
        self.bad, self.seen, self.skipped_in_a_row = 0, 0, 0

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        return {key: getattr(self, key) for key in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        for key in state.keys() & set(_STATE):
            setattr(self, key, state[key])
        if "first" not in state:  # of a checkpoint older than this watch: its first losses are not known
            self.max_growth = None

    def undecodable(self, batch: dict[str, Any]) -> int:
        """Report a micro batch's undecodable images on the rank that met them; gives their number."""
        for fault in batch["undecodable"]:
            print(f"undecodable image replaced by its neighbour: {fault}", file=sys.stderr, flush=True)
        return len(batch["undecodable"])

    def count(self, faults: int, samples: int) -> int:
        """Add a step's faults over all ranks; gives the total so far. Raises Stopped beyond data.max_undecodable."""
        self.bad, self.seen = self.bad + faults, self.seen + samples
        allowed = self.max_share * max(self.seen, self.epoch_samples)
        if faults and self.bad > allowed:
            raise Stopped(
                f"{self.bad} undecodable images among {self.seen} are more than data.max_undecodable "
                f"{self.max_share:g} allows; find them all with: dsmim shards verify --decode"
            )
        return self.bad

    def finite(self, step: int, loss: float, own_loss: float, result: StepResult, keys: list[str]) -> None:
        """Check a step that DeepSpeed has applied or, its gradient not being finite, skipped. loss: over all ranks.

        Raises Stopped after more than engine.max_skipped such steps in a row, and when the loss has diverged.
        """
        if math.isfinite(loss) and result.applied:
            self.skipped_in_a_row = 0
            self._converging(step, loss)
            return
        self.skipped_in_a_row += 1
        reports = self.runtime.gather(None if math.isfinite(own_loss) else (self.runtime.rank, own_loss, keys))
        lines = [
            f"\n  rank {report[0]}: loss {report[1]}, samples {' '.join(report[2])}" for report in reports if report
        ]
        done = "applied" if result.applied else "not applied"
        problem = f"step {step}: loss {loss}, gradient norm {result.grad_norm}; the step was {done}{''.join(lines)}"
        self.say(problem)
        if self.skipped_in_a_row > self.max_skipped:
            raise Stopped(
                f"{self.skipped_in_a_row} steps in a row were not finite (engine.max_skipped {self.max_skipped}); the "
                f"last checkpoint stands. Last: {problem}"
            )

    def _converging(self, step: int, loss: float) -> None:
        """Compare the last losses with the run's first. Runaway growth shows so; a fall back to chance does not."""
        self.first = self.first if len(self.first) == LOSSES else [*self.first, loss]
        self.last = [*self.last, loss][-LOSSES:]
        first, last = (sum(losses) / len(losses) for losses in (self.first, self.last))
        if self.max_growth is not None and len(self.last) == LOSSES and last > self.max_growth * first:
            raise Stopped(
                f"step {step}: the loss has diverged: {last:.4g} in the mean of the last {LOSSES} steps, "
                f"{first:.4g} in that of the first (engine.max_loss_growth {self.max_growth:g}); the last checkpoint "
                "stands. Lower optim.lr, lengthen schedule.warmup or tighten optim.clip_grad"
            )


_STATE = ("bad", "seen", "skipped_in_a_row", "first", "last")

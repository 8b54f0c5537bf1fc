"""Limits on faults in training: undecodable images, steps that are not finite, a loss that diverges."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import StepResult
from dsmim.health.outcome import Stopped
from dsmim.recipe import ClassifyTask, Recipe, SimMIMTask

LOSSES = 20  # steps over which the loss is averaged before it is compared

_UNTRAINED_SIMMIM = 1.0
"""A bound on the loss of an untrained network in masked image modelling: a prediction of 0 for pixels normalised to
variance 1 is off by at most 1 on average, and by about 0.8 on photographs."""

_STATE = ("bad", "seen", "skipped_in_a_row", "first", "last")
"""Attributes that a checkpoint keeps, by their names in state.json."""


class FaultLimits:
    """Counts faults over all ranks and stops the run on all of them when a limit of the recipe is exceeded.

    say: where rank 0 reports; epoch_samples: the share of undecodable images is taken of at least so many samples.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, say: Callable[[str], None], epoch_samples: int):
        self.max_share, self.max_skipped = recipe.data.max_undecodable, recipe.engine.max_skipped
        self.max_growth, self.untrained = recipe.engine.max_loss_growth, untrained_loss(recipe.task)
        self.first: list[float] = []
        """Losses of the run's first steps."""
        self.last: list[float] = []
        """Losses of the newest steps."""
        self.runtime, self.say, self.epoch_samples = runtime, say, epoch_samples
        self.bad, self.seen, self.skipped_in_a_row = 0, 0, 0

    def state(self) -> dict[str, Any]:
        """Return the counters that a resumed run continues with."""
        return {key: getattr(self, key) for key in _STATE}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with the counters of a checkpoint."""
        for key in state.keys() & set(_STATE):
            setattr(self, key, state[key])
        if "first" not in state:  # an older dsmim wrote the checkpoint: the run's first losses are not known
            self.max_growth = None

    def report_undecodable(self, batch: dict[str, Any]) -> int:
        """Report the undecodable images of this rank's micro batch, and return their number."""
        for fault in batch["undecodable"]:
            print(f"undecodable image replaced by its neighbour: {fault}", file=sys.stderr, flush=True)
        return len(batch["undecodable"])

    def count_undecodable(self, faults: int, samples: int) -> int:
        """Add a step's undecodable images of all ranks, and return their number so far.

        Raises Stopped when their share exceeds data.max_undecodable.
        """
        self.bad, self.seen = self.bad + faults, self.seen + samples
        allowed = self.max_share * max(self.seen, self.epoch_samples)
        if faults and self.bad > allowed:
            raise Stopped(
                f"{self.bad} undecodable images among {self.seen} are more than data.max_undecodable "
                f"{self.max_share:g} allows; find them all with: dsmim shards verify --decode"
            )
        return self.bad

    def check_step(self, step: int, loss: float, own_loss: float, result: StepResult, keys: list[str]) -> None:
        """Check a step that DeepSpeed has applied, or skipped because its gradient was not finite. Collective when loss
        or gradient are not finite.

        loss: of all ranks; own_loss: of this rank; keys: its samples. Raises Stopped after more than engine.max_skipped
        such steps in a row, and when the loss has diverged.
        """
        if math.isfinite(loss) and result.applied:
            self.skipped_in_a_row = 0
            self._check_growth(step, loss)
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
                f"last checkpoint is still valid. The last such step: {problem}"
            )

    def _check_growth(self, step: int, loss: float) -> None:
        """Compare the newest losses with the run's first ones, and with that of an untrained network: a fine-tuning
        may start near 0, and many times that is still a good loss.

        This shows a loss that grows without bound. It does not show one that falls back to the level of chance.
        """
        self.first = self.first if len(self.first) == LOSSES else [*self.first, loss]
        self.last = [*self.last, loss][-LOSSES:]
        first, last = (sum(losses) / len(losses) for losses in (self.first, self.last))
        if self.max_growth is None or len(self.last) < LOSSES:
            return
        if last > max(self.max_growth * first, self.untrained):
            raise Stopped(
                f"step {step}: the loss has diverged: its mean is {last:.4g} over the last {LOSSES} steps and "
                f"{first:.4g} over the first (engine.max_loss_growth {self.max_growth:g}); the last checkpoint is "
                "still valid. Lower optim.lr, lengthen schedule.warmup or tighten optim.clip_grad"
            )


def untrained_loss(task: SimMIMTask | ClassifyTask) -> float:
    """Return the training loss of an untrained network, whose logits are about 0. Label smoothing and mixing do not
    change it: in classification it is ln(classes), that of equal probabilities; with bce ln(2) per class, whatever the
    target."""
    if task.name != "classify":
        return _UNTRAINED_SIMMIM
    return math.log(2 if task.loss == "bce" else task.num_classes)

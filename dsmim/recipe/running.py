"""The sections of a recipe that say what a run measures, saves and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsmim.recipe.section import Count, Duration, Positive, Section, Share


class Validation(Section):
    """When the validation set is measured."""

    every: Duration = Duration(epochs=1)
    """How often the validation set is measured. It is always measured at the end too."""
    ema: bool = False
    """Measure the moving average of the weights (optim.ema_decay) too: val_ema_loss, val_ema_accuracy, …; a validation
    takes twice as long."""


class Best(Section):
    """What makes one checkpoint better than another."""

    metric: str
    """A figure of the validation, named as in metrics.jsonl without val_: loss, accuracy, …; with validation.ema also
    ema_loss, ema_accuracy, …"""
    mode: Literal["min", "max"]
    """min for a loss, max for an accuracy."""


class SaveEvery(Duration):
    """The time between two checkpoints: a length of training, or minutes by the clock."""

    minutes: Positive | None = None
    """Minutes since the last checkpoint, or since this start of the run, by rank 0's clock."""

    def in_steps(self, global_batch: int, epoch_samples: int) -> int:
        """Return the number of optimizer steps, as Duration does; 0 when the clock decides."""
        return 0 if self.minutes is not None else super().in_steps(global_batch, epoch_samples)


class Checkpoint(Section):
    """When checkpoints are written, and which are kept."""

    every: SaveEvery = SaveEvery(epochs=1)
    """How often a checkpoint is written. One is always written at the end too."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: Duration | None = None
    """Save and keep checkpoints at multiples of this length too; null: none."""
    keep_best: Best | None = None
    """Keep the checkpoint with the best validation too, and save one at each validation that is the best so far; null:
    no."""
    background: bool = False
    """Copy the state to host memory, and continue training while the copy is written: a shorter stall, but host memory
    for a rank's shard."""
    before_end_minutes: Annotated[float, Field(ge=0)] = 5
    """Save and stop this long before the job ends, if its end is known (as under Slurm); 0: ignore the end."""


class Log(Section):
    """What is logged."""

    every: Count = 10
    """Steps between two lines of the log."""
    low_memory: Share = 0.05
    """Warn when less than this share of a node's memory is left (of the job's memory, if Slurm limits it)."""
    tensorboard: bool = True
    """Write the figures for TensorBoard too."""

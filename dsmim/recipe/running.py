"""The sections of a recipe that say what a run measures, saves and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsmim.recipe.section import Count, Duration, Section, Share


class Validation(Section):
    """When the validation set is measured."""

    every: Duration = Duration(epochs=1)
    """How often the validation set is measured. It is always measured at the end too."""


class Best(Section):
    """What makes one checkpoint better than another."""

    metric: str
    """A figure of the validation, named as in metrics.jsonl without val_: loss, accuracy, …"""
    mode: Literal["min", "max"]


class Checkpoint(Section):
    """When checkpoints are written, and which are kept."""

    every: Duration = Duration(epochs=1)
    """How often a checkpoint is written. One is always written at the end too."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: Duration | None = None
    """Save checkpoints at multiples of this length too, and keep them; null: none."""
    keep_best: Best | None = None
    """Keep the checkpoint with the best validation at its own step too; null: none."""
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

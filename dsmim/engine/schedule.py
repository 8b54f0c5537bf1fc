"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from dsmim.recipe import Optim, Schedule


@dataclass(frozen=True)
class LearningRate:
    """A resolved schedule, in steps."""

    peak: float
    warmup_lr: float
    min_lr: float
    warmup: int
    total: int
    milestones: tuple[int, ...]
    """Empty: cosine."""
    gamma: float

    def at(self, step: int, scale: float = 1.0) -> float:
        """The rate of the optimizer step `step` (from 0) for parameters whose rate is scaled by layer decay.

        Linear warm-up from warmup_lr; then a cosine down to min_lr at the end, or steps by gamma. warmup_lr and
        min_lr are floors shared by all layers, as in microsoft/SimMIM, but never above a layer's own peak.
        """
        peak = self.peak * scale
        low, floor = min(self.warmup_lr, peak), min(self.min_lr, peak)
        if step < self.warmup:
            return low + (peak - low) * step / self.warmup
        if self.milestones:
            return peak * self.gamma ** bisect_right(self.milestones, step)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def resolve(schedule: Schedule, optim: Optim, global_batch: int, epoch_samples: int) -> LearningRate:
    """Durations into steps, rates through the recipe's scaling rule.

    The cosine starts after the warm-up (WARMUP_PREFIX in microsoft/Swin-Transformer).
    Raises ValueError when the warm-up is longer than the training.
    """
    factor = global_batch / optim.lr_base_batch if optim.lr_scaling == "linear" else 1.0
    total = schedule.duration.in_steps(global_batch, epoch_samples)
    warmup = schedule.warmup.in_steps(global_batch, epoch_samples)
    if warmup > total:
        raise ValueError(f"schedule.warmup: {warmup} steps are more than the whole duration of {total} steps")
    milestones = tuple(m.in_steps(global_batch, epoch_samples) for m in schedule.milestones)
    rates = (rate * factor for rate in (optim.lr, schedule.warmup_lr, schedule.min_lr))
    return LearningRate(*rates, warmup, total, milestones, schedule.gamma)

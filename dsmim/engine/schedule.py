"""The learning rate as a pure function of the step: a checkpoint needs no state of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dsmim.recipe import Duration, Optim, Schedule


@dataclass(frozen=True)
class LearningRate:
    """A schedule with its durations in steps."""

    peak: float
    warmup_lr: float
    min_lr: float
    warmup: int
    total: int
    milestones: tuple[int, ...]
    """Steps at which the rate is multiplied by gamma; empty: a cosine instead."""
    gamma: float
    cosine_from: int = 0
    """Step at which the cosine begins: the end of the warm-up, or 0."""
    epoch: int | None = None
    """Steps of an epoch where the rate changes once per epoch; None: it changes every step."""
    scaled_whole: bool = False
    """Whether layer decay scales the whole rate, not only the peak."""

    def at(self, step: int, scale: float = 1.0) -> float:
        """Return the learning rate of the optimizer step `step` (from 0).

        scale: factor of layer decay. Linear warm-up from warmup_lr; then a cosine down to min_lr, or steps by gamma.
        If only the peak is scaled, warmup_lr and min_lr are the same for all layers, but never above a layer's own
        peak.
        """
        step = self._counted(step)
        return self._of(step, self.peak) * scale if self.scaled_whole else self._of(step, self.peak * scale)

    def _counted(self, step: int) -> int:
        """Return the step whose rate a step has. Once per epoch: epoch e has that of the begin of epoch max(e - 1, 0)
        (main.py of facebookresearch/deit calls lr_scheduler.step(e) after epoch e)."""
        return step if self.epoch is None else max(step // self.epoch - 1, 0) * self.epoch

    def _of(self, step: int, peak: float) -> float:
        first, last = min(self.warmup_lr, peak), min(self.min_lr, peak)
        if step < self.warmup:
            return first + (peak - first) * step / self.warmup
        if self.milestones:
            return peak * self.gamma ** bisect_right(self.milestones, step)
        done = (step - self.cosine_from) / max(1, self.total - self.cosine_from)
        return last + (peak - last) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def resolve_schedule(schedule: Schedule, optim: Optim, global_batch: int, epoch_samples: int) -> LearningRate:
    """Return the recipe's schedule with durations in steps and rates after the recipe's scaling rule.

    epoch_samples: samples of one epoch. Raises ValueError when the warm-up is longer than the training, for milestones
    that are not in order or not before the end, and where a rate that changes once per epoch would never change.
    """
    factor = global_batch / optim.lr_base_batch if optim.lr_scaling == "linear" else 1.0
    total = schedule.duration.in_steps(global_batch, epoch_samples)
    warmup = schedule.warmup.in_steps(global_batch, epoch_samples)
    if warmup > total:
        raise ValueError(
            f"schedule.warmup: {warmup} steps are more than the whole duration of {total} steps; give a shorter "
            "warm-up (schedule.warmup={steps: N}), or a longer schedule.duration"
        )
    milestones = tuple(m.in_steps(global_batch, epoch_samples) for m in schedule.milestones)
    _check_milestones(schedule.milestones, milestones, total)
    rates = (rate * factor for rate in (optim.lr, schedule.warmup_lr, schedule.min_lr))
    return LearningRate(
        *rates, warmup, total, milestones, schedule.gamma,
        cosine_from=0 if schedule.cosine == "whole" else warmup,
        epoch=None if schedule.update == "step" else _epoch_steps(schedule, total, global_batch, epoch_samples),
        scaled_whole=schedule.layer_scale == "rate",
    )  # fmt: skip


def _epoch_steps(schedule: Schedule, total: int, global_batch: int, epoch_samples: int) -> int:
    """Return the steps of an epoch. Raises ValueError for an epoch of no step, and for a training of fewer than three
    epochs: the first two have the same rate."""
    steps = (schedule.epoch or Duration(epochs=1)).in_steps(global_batch, epoch_samples)
    if steps < 1:
        raise ValueError("schedule.epoch: an epoch has at least 1 step")
    if total <= 2 * steps:
        raise ValueError(
            f"schedule.update: with epoch the first two epochs have the first rate, and the whole duration of {total} "
            f"steps has no third one (an epoch has {steps} steps): the rate would never change; give a longer "
            "schedule.duration, a shorter epoch (schedule.epoch={steps: N}), or schedule.update=step"
        )
    return steps


def _check_milestones(given: Sequence[Duration], steps: Sequence[int], total: int) -> None:
    """Raise ValueError, with every pair of milestones that is not in order and every one that is not before the end.

    Their units may differ, so only their steps can be compared.
    """
    names = [f"schedule.milestones[{i}] ({_shown(one)})" for i, one in enumerate(given)]
    problems = [
        f"{names[i]} is step {steps[i]}, {names[i + 1]} is step {steps[i + 1]}: each must be later than the one before"
        for i in range(len(steps) - 1)
        if steps[i] >= steps[i + 1]
    ]
    problems += [
        f"{name} is step {step}, but training ends after {total} steps: it would never have an effect; remove it, or "
        "change it with schedule.duration"
        for name, step in zip(names, steps, strict=True)
        if step >= total
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _shown(duration: Duration) -> str:
    return ", ".join(f"{unit}: {value:g}" for unit, value in duration.model_dump(exclude_none=True).items())

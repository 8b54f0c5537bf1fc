"""What a recipe costs, by arithmetic."""

from __future__ import annotations

from dsmim.recipe.schema import Recipe


def gpu_hours(recipe: Recipe, tflops: float) -> float | None:
    """Return the hours of one GPU that does `tflops` · 10¹² operations per second all the time; None if not known.

    A multiply-accumulate is two operations, and forward and backward pass together cost three forward passes (arXiv
    2001.08361). Recomputing every n-th block adds 1 / n of a forward pass. Blocks that drop path leaves out count.
    """
    steps = recipe.schedule.duration.steps
    if recipe.about.gmacs is None or steps is None:  # samples of an epoch are not known here
        return None
    every = recipe.model.grad_checkpointing
    forwards = 3 + (1 / every if every else 0)
    operations = 2e9 * recipe.about.gmacs * forwards * steps * recipe.batch.global_batch
    return operations / (tflops * 1e12) / 3600

"""A moving average of the weights, partitioned like the optimizer's moments.

It is kept in the optimizer's state, beside them. So DeepSpeed saves, loads and partitions it as it does the moments,
at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsmim.engine.zero_internals import release_gathered, update_forward_weights

KEY = "ema"
SWAPPED_AT_ONCE = 1 << 24
"""Elements that are swapped through a temporary copy: 64 MiB of memory, whatever the size of a shard."""


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """Return the decay of the average's update after the optimizer step `step` (from 0).

    warmup: at most 1 - (step + 1)^(-2/3), so that the average first follows the weights closely. This is get_decay of
    timm's ModelEmaV3 (timm/utils/model_ema.py) with use_warmup, warmup_gamma 1 and warmup_power 2/3: timm's update
    number step + 1 has 1 - (1 + step)^(-2/3).
    """
    return min(decay, 1 - (step + 1) ** (-2 / 3)) if warmup else decay


def update(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Set ema ← decay · ema + (1 - decay) · weights, on this rank's masters. To be called after an applied step.

    It starts with the weights after the first step: the optimizer has no state before.
    """
    for master, state in optimizer.state.items():
        if KEY in state:
            state[KEY].lerp_(master.detach(), 1 - decay)
        else:
            state[KEY] = master.detach().clone()


@contextmanager
def swapped_in(optimizer: torch.optim.Optimizer, zero: Any, stage: int) -> Iterator[None]:
    """Let the forward pass use the average instead of the weights within a `with` block. Collective.

    zero: DeepSpeed's optimizer; stage: its ZeRO stage. Masters and average exchange their values, so no copy of either
    is needed, and afterwards every bit is what it was before. Nothing is exchanged where there is no average yet: it
    begins with the weights. An error in the block leaves the average in place, because other ranks may have failed
    elsewhere and would not take part in the way back: such a run ends without saving.
    """
    _exchange(optimizer, zero, stage)
    yield
    _exchange(optimizer, zero, stage)


@torch.no_grad()
def _exchange(optimizer: torch.optim.Optimizer, zero: Any, stage: int) -> None:
    release_gathered(zero, stage)
    for master, state in optimizer.state.items():
        if KEY in state:
            _swap(master.detach().view(-1), state[KEY].view(-1))
    update_forward_weights(zero, stage)


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange the values of two flat tensors, piece by piece."""
    for left, right in zip(one.split(SWAPPED_AT_ONCE), other.split(SWAPPED_AT_ONCE), strict=True):
        kept = left.clone()
        left.copy_(right)
        right.copy_(kept)


def drop(optimizer: torch.optim.Optimizer) -> None:
    """Remove the average from the optimizer's state."""
    for state in optimizer.state.values():
        state.pop(KEY, None)

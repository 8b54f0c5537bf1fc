"""A moving average of the weights, partitioned like the optimizer's moments.

It is kept in the optimizer's state, beside them. So DeepSpeed saves, loads and partitions it as it does the moments,
at every ZeRO stage.
"""

from __future__ import annotations

import torch

KEY = "ema"


def update(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Set ema ← decay · ema + (1 - decay) · weights, on this rank's masters. To be called after an applied step.

    It starts with the weights after the first step: the optimizer has no state before.
    """
    for master, state in optimizer.state.items():
        if KEY in state:
            state[KEY].lerp_(master.detach(), 1 - decay)
        else:
            state[KEY] = master.detach().clone()


def drop(optimizer: torch.optim.Optimizer) -> None:
    """Remove the average from the optimizer's state."""
    for state in optimizer.state.values():
        state.pop(KEY, None)

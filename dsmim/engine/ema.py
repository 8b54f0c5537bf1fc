"""A moving average of the weights, in shards like the optimizer's moments.

It lies in the optimizer's state, next to them: DeepSpeed then saves, restores and cuts it up as it does those, at every
ZeRO stage.
"""

from __future__ import annotations

import torch

KEY = "ema"


def update(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """ema ← decay · ema + (1 - decay) · weights, on this rank's masters, after an applied step.

    The first step's weights are where it starts, since an optimizer has no state before.
    """
    for master, state in optimizer.state.items():
        if KEY in state:
            state[KEY].lerp_(master.detach(), 1 - decay)
        else:
            state[KEY] = master.detach().clone()


def drop(optimizer: torch.optim.Optimizer) -> None:
    """Forget an average that a checkpoint brought and the recipe does not keep."""
    for state in optimizer.state.values():
        state.pop(KEY, None)

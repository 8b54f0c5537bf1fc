"""Running a stack of blocks: activation checkpointing and torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recompute:
    """Which blocks forget their activations and compute them again in the backward pass.

    every: each k-th block (1: all, 0: none), the last of each k; stages: only those of the first n stages (None: all).
    The random stream of a block (drop path) is the same both times.
    """

    def __init__(self, every: int = 0, stages: int | None = None):
        self.every, self.stages = every, stages

    def __call__(self, block: int, stage: int = 0) -> bool:
        """Whether this block, counted through the network, is one of them."""
        inside = self.stages is None or stage < self.stages
        return self.every > 0 and inside and (block + 1) % self.every == 0


def run(blocks: Iterable[nn.Module], x: torch.Tensor, recompute: Recompute, first: int = 0, stage: int = 0):
    """x through the blocks, of which the first is number `first` of the network."""
    for number, block in enumerate(blocks, first):
        if torch.is_grad_enabled() and recompute(number, stage):
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x

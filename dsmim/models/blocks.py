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


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every block by itself, so that ZeRO-3's gathers lie between the graphs (compiled whole, a network
    fails there on parameters used outside their module). Raises ValueError for a network without a list of blocks."""
    blocks = blocks_of(model)
    # One graph per kind of block, in training and in evaluation. Beyond the limit dynamo would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks:  # its forward alone: hooks on the block, such as ZeRO-3's, stay out of the graph
        block.forward = torch.compile(block.forward, dynamic=False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of one of our networks, or of one of timm that keeps them likewise, in order."""
    holders = [model, *getattr(model, "layers", []), *getattr(model, "stages", [])]
    blocks = [block for holder in holders for block in getattr(holder, "blocks", [])]
    if not blocks:
        raise ValueError("model.compile: this network of timm has no blocks to compile one by one; leave it off")
    return blocks


def run(blocks: Iterable[nn.Module], x: torch.Tensor, recompute: Recompute, first: int = 0, stage: int = 0):
    """x through the blocks, of which the first is number `first` of the network."""
    for number, block in enumerate(blocks, first):
        if torch.is_grad_enabled() and recompute(number, stage):
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x

"""Run a stack of blocks, with activation checkpointing and torch.compile block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsmim.models.stochastic_depth import DropPath


class Recompute:
    """Which blocks drop their activations and compute them again in the backward pass.

    every: each k-th block, the last of each group of k (1: all blocks, 0: none). stages: only blocks of the first n
    stages (None: all stages). A block draws the same random numbers (drop path) both times.
    """

    def __init__(self, every: int = 0, stages: int | None = None):
        self.every, self.stages = every, stages

    def __call__(self, block: int, stage: int = 0) -> bool:
        """Return whether this block, numbered through the whole network, is one of them."""
        inside = self.stages is None or stage < self.stages
        return self.every > 0 and inside and (block + 1) % self.every == 0


def compile_blocks(model: nn.Module) -> None:
    """Compile every block separately (torch.compile), so that ZeRO-3's all-gathers are between the graphs.

    A network compiled as a whole fails under ZeRO-3 on parameters that are used outside their module. Of a block of
    ours with drop path the branches are compiled, for any number of samples: it changes with every step. Raises
    ValueError for a network without a list of blocks.
    """
    blocks = blocks_of(model)
    # One graph per kind of block, in training and in evaluation. Above the limit, dynamo would continue uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks:  # only its forward: hooks on the block, such as ZeRO-3's, stay out of the graph
        if any(isinstance(module, DropPath) and module.drop_prob for module in block.modules()):
            for name in block.branches:
                setattr(block, name, _compiled_branch(getattr(block, name)))
        else:
            block.forward = torch.compile(block.forward, dynamic=False)


def _compiled_branch(branch: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the branch, compiled once for all numbers of samples; dynamo would compile 0 and 1 separately."""
    compiled = torch.compile(branch)

    def call(*inputs, **options) -> torch.Tensor:
        x = inputs[-1]
        if len(x) < 2:
            return branch(*inputs, **options)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*inputs, **options)

    return call


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the residual blocks, in order, of our networks and of timm's networks that store them in the same way.

    Raises ValueError for a network without them.
    """
    holders = [model, *getattr(model, "layers", []), *getattr(model, "stages", [])]
    blocks = [block for holder in holders for block in getattr(holder, "blocks", [])]
    if not blocks:
        raise ValueError("model.compile: this network of timm has no blocks to compile one by one; leave it off")
    return blocks


def run(blocks: Iterable[nn.Module], x: torch.Tensor, recompute: Recompute, first: int = 0, stage: int = 0):
    """Return x after these blocks. The first of them is block number `first` of the network."""
    for number, block in enumerate(blocks, first):
        if torch.is_grad_enabled() and recompute(number, stage):
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x

"""Fills a model's parameters in host memory and moves them to where they are trained.

Besides what training needs anyway, only one module's parameters are in memory at a time: neither a node's memory nor a
GPU's must hold a copy of the model per rank. All ranks get rank 0's values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsmim.engine.runtime import Runtime
from dsmim.models import frozen_modules


def construct(model: nn.Module, parts: Iterable[nn.Module], config: dict[str, Any], stage: int, runtime: Runtime):
    """Move the parameters of each module of `parts` to the device, at ZeRO stage 3 as shards; then all buffers.

    parts: yields the model's modules, each with its parameters just filled in host memory (see Task.fill); config: the
    complete DeepSpeed configuration, used at stage 3. DeepSpeed would leave buffers in host memory.
    """
    if stage == 3:
        import deepspeed

        deepspeed.zero.Init(module=_OneByOne(parts), config_dict_or_path=config)
    else:
        for module in parts:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(runtime.device)
    move_buffers(model, runtime.device)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move every buffer, saved or not, to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def share_buffers(model: nn.Module, runtime: Runtime) -> None:
    """Give rank 0's saved buffers to all ranks. Collective.

    Raises ValueError for running statistics, except in a frozen part: ranks would update them from different samples.
    """
    if runtime.world_size > 1:
        frozen = set(frozen_modules(model))
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats and module not in frozen:
                raise ValueError(
                    f"model.name: {name} keeps running statistics (BatchNorm), which would differ from rank to rank; "
                    "take a network with LayerNorm, or train with one rank"
                )
    for buffer in saved_buffers(model).values():
        dist.broadcast(buffer, src=0)


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that a state_dict holds, in the order of their names."""
    names = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    return {name: model.get_buffer(name) for name in sorted(names)}


def autocast_modules(model: nn.Module) -> list[str]:
    """Return the classes of the modules whose weights DeepSpeed may send as bfloat16.

    These are the modules that multiply in bfloat16 under autocast, without those marked `keep_fp32`. DeepSpeed compares
    classes exactly, so subclasses must be named too.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {type(m) for m in model.modules() if isinstance(m, kinds) and not getattr(m, "keep_fp32", False)}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in found)


class _OneByOne(nn.Module):
    """Gives `zero.Init` the parameters of one module at a time. It broadcasts rank 0's values, keeps this rank's shard
    and frees the rest before the next module is filled."""

    def __init__(self, parts: Iterable[nn.Module]):
        super().__init__()
        self.parts = parts

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for module in self.parts:
            yield from module.parameters(recurse=False)

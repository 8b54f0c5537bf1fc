"""From a model without weights to one whose weights lie where they will be trained.

What is in memory at once, beside what training needs anyway, is one module's parameters: neither a node's memory nor a
GPU's must hold a copy of the model per rank. Rank 0's values are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsmim.engine.runtime import Runtime


def construct(model: nn.Module, parts: Iterable[nn.Module], config: dict[str, Any], stage: int, runtime: Runtime):
    """Take the modules of the model as `parts` gives them, each with its parameters just filled in host memory, and
    send these to the device, at ZeRO stage 3 as shards; then the buffers, which DeepSpeed would leave there."""
    if stage == 3:
        import deepspeed

        deepspeed.zero.Init(module=_Parts(parts), config_dict_or_path=config)
    else:
        for module in parts:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(runtime.device)
    move_buffers(model, runtime.device)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Every buffer, saved or not, to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def share_buffers(model: nn.Module, runtime: Runtime) -> None:
    """Rank 0's saved buffers to all ranks. Raises ValueError for running statistics that ranks would not share."""
    if runtime.world_size > 1:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                raise ValueError(
                    f"model.name: {name} keeps running statistics (BatchNorm), which would differ from rank to rank; "
                    "take a network with LayerNorm, or train by one rank"
                )
    for buffer in saved_buffers(model).values():
        dist.broadcast(buffer, src=0)


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state_dict holds, by name, in the order of names."""
    names = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    return {name: model.get_buffer(name) for name in sorted(names)}


class _Parts(nn.Module):
    """What `zero.Init` is given to cut up: it asks for parameters, broadcasts rank 0's and keeps its shard, one by one,
    so that the next come into being when these have gone."""

    def __init__(self, parts: Iterable[nn.Module]):
        super().__init__()
        self.parts = parts

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for module in self.parts:
            yield from module.parameters(recurse=False)


def autocast_modules(model: nn.Module) -> list[str]:
    """Classes of the modules whose weights DeepSpeed may send as bfloat16: those that multiply in it under autocast,
    but for fp32 islands (`keep_fp32`). DeepSpeed compares classes exactly, so that subclasses must be named."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {type(m) for m in model.modules() if isinstance(m, kinds) and not getattr(m, "keep_fp32", False)}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in found)

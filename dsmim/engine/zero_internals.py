"""What dsmim reads and corrects inside DeepSpeed's ZeRO optimizers (0.19), which have no public interface for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def share_masters(optimizer: Any) -> None:
    """Make ZeRO-3's master weights the same memory as its fp32 weights: 4 bytes per parameter less.

    DeepSpeed intends this where weights are fp32 already, as under torch_autocast (runtime/zero/stage3.py,
    _create_fp32_partitions), but it compares a torch.device with a string and copies them.
    """
    masters, weights = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    for master, weight in zip(masters, weights, strict=True):
        if weight is not None and (weight.dtype, weight.device) == (master.dtype, master.device):
            master.data = weight.data


def clear_padding(optimizer: Any, rank: int) -> None:
    """Set the padding of ZeRO-3's shards to zero: what follows the last element of a parameter that the ranks do not
    divide evenly. DeepSpeed leaves there what the memory held, so two checkpoints of the same weights would differ."""
    for master, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        begin = 0
        for parameter in group:
            size, (_, own) = parameter.partition_numel(), own_part(parameter, rank)
            if master is not None:
                master.data[begin + own : begin + size] = 0
            begin += size


def on_nvme(optimizer: Any) -> bool:
    """Return whether DeepSpeed keeps weights or the optimizer's state on NVMe, where no flat tensor holds them."""
    return bool(getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False))


def release_gathered(optimizer: Any, stage: int) -> None:
    """Free the whole parameters that are gathered at stage 3, also those that always stay so, before their shards
    change: they would hide the change. Collective."""
    if stage == 3:
        optimizer.checkpoint_event_prologue()


def update_forward_weights(optimizer: Any, stage: int) -> None:
    """Copy the masters to the weights that the forward pass uses. Collective. At stage 0 both are the same tensors.

    optimizer: DeepSpeed's. At stage 3 release_gathered goes before the change of the masters.
    """
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that always stay gathered


def release_modules(module: nn.Module) -> None:
    """Take a closed engine's model out of what DeepSpeed keeps for the whole process. Without ZeRO-3, do nothing.

    Otherwise the model, its engine and its process groups stay in memory as long as the process. DeepSpeed never
    removes the model itself from FWD_MODULE_STACK (runtime/zero/parameter_offload.py, setup_zero_stage3_hooks), and the
    cache of __params_to_release holds every coordinator and module (runtime/zero/partitioned_param_coordinator.py: an
    lru_cache of a method). Another engine of the process loses only cached results, which it computes again.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    own = {id(part) for part in module.modules()}
    FWD_MODULE_STACK[:] = [part for part in FWD_MODULE_STACK if id(part) not in own]
    method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():  # of DeepSpeed's decorator around the cache
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def own_part(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """Return the first element and the number of elements (no padding) that a rank has of a parameter at stage 3."""
    size = parameter.partition_numel()
    start = min(rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a whole parameter, also where this rank has only a shard of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def group_members(engine: Any, stage: int) -> list[list[str]]:
    """Return the names of the parameters that each of DeepSpeed's groups really updates. engine: DeepSpeed's.

    Each stage keeps them in another place (runtime/zero/stage_1_and_2.py: bit16_groups; stage3.py: fp16_groups, which
    are sub-groups).
    """
    optimizer, names = engine.optimizer, engine.param_names
    if stage == 0:
        return [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if stage < 3:
        return [[names[p] for p in group] for group in optimizer.bit16_groups]
    members: list[list[str]] = [[] for _ in optimizer.param_groups]
    for number, group in enumerate(optimizer.fp16_groups):
        members[optimizer.sub_group_to_group_id[number]] += [names[p] for p in group]
    return members

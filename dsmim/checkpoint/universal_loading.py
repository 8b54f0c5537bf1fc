"""Loads a universal checkpoint into a freshly made engine of any ZeRO stage and any number of ranks.

This module writes the flat tensors that the optimizer steps, as DeepSpeed does when it loads its own checkpoints.
DeepSpeed's other ways do not work here (0.19):

- `checkpoint.load_universal` at stage 3 gives all groups the settings and the step counter of one, and does not know
  the moving average. It refuses a checkpoint of another stage. At stages 1 and 2 it fails if a rank has no element of a
  group.
- `safe_set_local_optimizer_state` and similar functions write to a state that torch's optimizer does not have before
  its first step. `safe_set_full_*` lose the end of a parameter that the ranks do not divide evenly. None of them
  changes the weights that the forward pass uses.

Besides engine/layout.py, this relies on what engine/zero_internals.py calls in DeepSpeed to use new masters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmim.checkpoint.loaded_check import check_loaded
from dsmim.checkpoint.model_check import check_same_model
from dsmim.checkpoint.universal import read_manifest, read_module, read_parameter
from dsmim.engine.construct import saved_buffers
from dsmim.engine.layout import EnginePiece, FlatTensor, flat_tensors
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine
from dsmim.engine.zero_internals import on_nvme, own_part, release_gathered, update_forward_weights

Manifest = dict[str, Any]


def load_universal(universal: Path, engine: Engine, runtime: Runtime) -> None:
    """Load a checkpoint's weights, moments, moving average, step counters and buffers into an engine that has not
    stepped yet. The settings of its groups (rates, decay) do not change. Collective.

    Raises Stopped when the checkpoint is of another model, or cannot be read, or is damaged.
    """
    manifest = runtime.on_rank_zero(lambda: read_manifest(universal))
    with runtime.all_or_none():
        check_same_model(universal, manifest, engine)
        _check_not_on_nvme(engine)
    release_gathered(engine.deepspeed.optimizer, engine.stage)
    flats = flat_tensors(engine.deepspeed, engine.stage, runtime.rank)
    with torch.no_grad():
        with runtime.all_or_none():
            _fill_all(universal, manifest, engine, flats, runtime.rank)
        update_forward_weights(engine.deepspeed.optimizer, engine.stage)
    for counter, value in manifest["counters"].items():
        setattr(engine.deepspeed, counter, value)  # not micro_steps: a checkpoint is saved between two steps
    check_loaded(universal, manifest, engine, flats, runtime)
    engine.finish_loading()


def _check_not_on_nvme(engine: Engine) -> None:
    if on_nvme(engine.deepspeed.optimizer):
        raise ValueError(
            "engine.deepspeed: with weights or optimizer offloaded to NVMe a run can resume only with the number of "
            "ranks, the ZeRO stage and the parameter groups (optim.no_decay, optim.layer_decay) of its checkpoint; "
            "start it so, or use a file without NVMe"
        )


def _fill_all(universal: Path, manifest: Manifest, engine: Engine, flats: list[FlatTensor], rank: int) -> None:
    for flat in flats:
        _fill_weights(universal, flat)
        _fill_state(universal, manifest["parameters"], flat, engine.optimizer)
    module = read_module(universal)
    for name, buffer in saved_buffers(engine.module).items():
        buffer.copy_(module[name])
    for name, parameter in engine.module.named_parameters():
        if name in manifest["frozen"]:
            _fill_frozen(parameter, module[name].flatten(), rank)


def _fill_weights(universal: Path, flat: FlatTensor) -> None:
    flat.master.zero_()  # the padding too: it would be saved with what the memory held before
    for piece in flat.pieces:
        piece.of_flat(flat.master).copy_(_read_piece(universal, piece, "fp32"))


def _fill_state(
    universal: Path, parameters: dict[str, Any], flat: FlatTensor, optimizer: torch.optim.Optimizer
) -> None:
    """Make the state that the optimizer would have made. Each flat tensor has its own step counter, because torch
    counts it up in place."""
    keys = [key for key in parameters[flat.names[0]]["checksums"] if key != "fp32"]
    state = optimizer.state[flat.master] if keys else {}
    for key, scalar in _common_scalars(universal, parameters, flat.names).items():
        state[key] = _scalar(optimizer, flat.master, **scalar)
    for key in keys:
        state[key] = torch.zeros_like(flat.master, requires_grad=False)
        for piece in flat.pieces:
            piece.of_flat(state[key]).copy_(_read_piece(universal, piece, key))


def _common_scalars(universal: Path, parameters: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return what the optimizer keeps once per tensor, of parameters that are stepped as one."""
    (first, one), *others = [(name, found) for name in names if (found := parameters[name]["scalars"])] or [("", {})]
    for name, found in others:
        if different := [key for key in one if found.get(key) != one[key]]:
            raise ValueError(
                f"{universal}: {first} and {name} are in one parameter group now, but the optimizer keeps another "
                f"{different[0]} for each; restore optim.layer_decay, optim.weight_decay and optim.no_decay"
            )
    return one


def _scalar(optimizer: torch.optim.Optimizer, master: torch.Tensor, value: float, dtype: str | None) -> Any:
    """Return a number as it was saved; a tensor is on the device if torch's kernels use it there (fused, capturable),
    else in host memory."""
    if dtype is None:
        return value
    on_device = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
    return torch.tensor(value, dtype=getattr(torch, dtype), device=master.device if on_device else "cpu")


def _fill_frozen(parameter: nn.Parameter, value: torch.Tensor, rank: int) -> None:
    if hasattr(parameter, "ds_tensor"):  # stage 3
        start, numel = own_part(parameter, rank)
        parameter.ds_tensor.narrow(0, 0, numel).copy_(value.narrow(0, start, numel))
    else:
        parameter.copy_(value.view(parameter.shape))


def _read_piece(universal: Path, piece: EnginePiece, key: str) -> torch.Tensor:
    return piece.of_whole(read_parameter(universal, piece.name, key))

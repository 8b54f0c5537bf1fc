"""Whether DeepSpeed may load a checkpoint's files as they are.

DeepSpeed copies the flat tensors of a rank's files into those of the engine without a look at any name. That is right
only if every parameter is at the same place in both. Places change with the parameter groups (optim.no_decay,
optim.layer_decay), with the order of the model's modules, and with settings of the DeepSpeed JSON that cut or order the
tensors in another way (sub_group_size, round_robin_gradients). What this relies on in DeepSpeed 0.19:

    stage 1, 2  round_robin_bit16_padding and partition_size, of each group (runtime/zero/stage_1_and_2.py)
    stage 1-3   _get_zero_param_shapes(): per group or sub-group, the parameters in their order (runtime/engine.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsmim.checkpoint.saved_layout import alignment_gaps, partition_sizes
from dsmim.checkpoint.zero_shards import MODEL_FILE, OPTIMIZER_FILE, load_file
from dsmim.engine.construct import saved_buffers
from dsmim.engine.zero import Engine
from dsmim.engine.zero_internals import group_members

Shapes = dict[str, list[int]]
Places = tuple[list, list, Shapes]
"""The trained parameters by group and in their order; at stages 1 and 2, how each group is padded and cut; the shapes
of the tensors that are loaded by name."""


def same_places(checkpoint: Path, order: list[list[str]], engine: Engine, rank: int) -> bool:
    """Return whether this rank's files hold the engine's tensors: the same names and shapes at the same places.

    checkpoint: of the engine's stage, and unless that is 0, of its number of ranks; order: the names of the
    parameters, by group, from its state.json. Raises ValueError when a file cannot be read.
    """
    return _in_files(checkpoint, order, engine.stage, rank) == _in_engine(engine)


def _in_files(checkpoint: Path, order: list[list[str]], stage: int, rank: int) -> Places:
    if stage == 3:
        model = load_file(checkpoint / f"zero_pp_rank_{rank}_{MODEL_FILE}")
        buffers = {name: model["module"][name] for name in model["buffer_names"]}
        frozen = {name: list(shape) for name, shape in (model["frozen_param_shapes"] or {}).items()}
        return _ordered(model["param_shapes"]), [], frozen | _shapes(buffers)
    model = load_file(checkpoint / MODEL_FILE)
    if stage == 0:
        return order, [], _shapes(model["module"])
    optimizer = load_file(checkpoint / f"zero_pp_rank_{rank}_{OPTIMIZER_FILE}")["optimizer_state_dict"]
    cuts = [alignment_gaps(model["param_shapes"], optimizer), partition_sizes(optimizer)]
    return _ordered(model["param_shapes"]), cuts, _shapes(model["module"])


def _in_engine(engine: Engine) -> Places:
    if engine.stage == 0:
        return group_members(engine.deepspeed, 0), [], _shapes(engine.module.state_dict())
    ordered = _ordered(engine.deepspeed._get_zero_param_shapes())
    if engine.stage == 3:
        frozen = {name: list(p.ds_shape) for name, p in engine.module.named_parameters() if not p.requires_grad}
        return ordered, [], frozen | _shapes(saved_buffers(engine.module))
    optimizer = engine.deepspeed.optimizer
    cuts = [optimizer.round_robin_bit16_padding, optimizer.partition_size]
    return ordered, cuts, _shapes(engine.module.state_dict())


def _shapes(tensors: dict[str, Any]) -> Shapes:
    return {name: list(value.shape) for name, value in tensors.items() if torch.is_tensor(value)}


def _ordered(groups: list[dict[str, torch.Size]]) -> list[list[tuple[str, list[int]]]]:
    return [[(name, list(shape)) for name, shape in group.items()] for group in groups]

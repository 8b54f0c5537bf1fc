"""Where each ZeRO stage keeps what the optimizer trains, in the files that DeepSpeed writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ORDER = "optimizer_parameters"
"""Key of state.json: per group of the optimizer, the names of its parameters. At stage 0 nothing else tells whose the
optimizer's numbered states are."""


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements, in the flat tensors of a rank's group."""

    rank: int
    group: int
    start: int
    numel: int


@dataclass
class Layout:
    """Of one checkpoint."""

    shapes: dict[str, torch.Size]
    pieces: dict[str, list[Piece]]
    """Of a parameter in the order of its elements."""
    masters: list[list[torch.Tensor]]
    """By rank and group, flat."""
    states: list[list[dict[str, Any]]]
    """By rank and group: the optimizer's state, flat tensors as long as the master or longer, and `step`."""


def sub_groups(groups: list[dict[str, torch.Size]], ranks: list[dict[str, Any]]) -> Layout:
    """Stage 3: rank R has the R-th of equally long pieces of every parameter, the last of them padded."""
    pieces: dict[str, list[Piece]] = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            size = math.ceil(shape.numel() / len(ranks))
            held = [min(size, shape.numel() - rank * size) for rank in range(len(ranks))]
            pieces[name] = [Piece(rank, group, start, numel) for rank, numel in enumerate(held) if numel > 0]
            start += size
    shapes = {name: shape for group in groups for name, shape in group.items()}
    masters = [rank["fp32_flat_groups"] for rank in ranks]
    return Layout(shapes, pieces, masters, [_states(rank, len(groups)) for rank in ranks])


def partitions(groups: list[dict[str, torch.Size]], ranks: list[dict[str, Any]]) -> Layout:
    """Stages 1 and 2: each group is one flat tensor cut into equal parts; every rank says what lies where in its own,
    which holds whatever the order and padding of parameters (round_robin_gradients, alignment)."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for rank, saved in enumerate(ranks):
        for group, mapping in enumerate(saved["param_slice_mappings"]):
            for name, where in mapping.items():
                pieces[name].append(Piece(rank, group, where.start, where.numel))
    masters = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    return Layout(shapes, pieces, masters, [_states(rank, len(groups)) for rank in ranks])


def numbered(model: dict[str, Any], order: list[str] | None, checkpoint: Path) -> Layout:
    """Stage 0: whole tensors; the optimizer numbers its parameters. Without the order, weights only."""
    module, buffers = model["module"], set(model["buffer_names"])
    if order is None:
        owners = {
            tensor.data_ptr() or name: name for name, tensor in reversed(module.items()) if torch.is_tensor(tensor)
        }
        names, states = [name for name in module if name in set(owners.values()) - buffers], {}
    else:
        names, states = order, model["optimizer"]["state"]
        numbered = sum(len(group["params"]) for group in model["optimizer"]["param_groups"])
        if len(names) != numbered or not set(names) <= module.keys():
            raise ValueError(
                f"{checkpoint / 'state.json'}: {ORDER} does not name the optimizer's {numbered} parameters"
            )
    shapes = {name: module[name].shape for name in names}
    pieces = {name: [Piece(0, number, 0, shapes[name].numel())] for number, name in enumerate(names)}
    flat = [
        {key: value.flatten() if torch.is_tensor(value) else value for key, value in states.get(number, {}).items()}
        for number in range(len(names))
    ]
    return Layout(shapes, pieces, [[module[name].flatten() for name in names]], [flat])


def _states(saved: dict[str, Any], groups: int) -> list[dict[str, Any]]:
    """By group or sub-group, each of which is one flat tensor to torch; one that was never stepped has no state."""
    state = torch_state(saved)["state"]
    return [state.get(number, {}) for number in range(groups)]


def torch_state(saved: dict[str, Any]) -> dict[str, Any]:
    """The torch optimizer's own state_dict, of a rank's file at stage 1, 2 or 3."""
    return saved["optimizer_state_dict"] if saved["zero_stage"] == 3 else saved["base_optimizer_state"]

"""Where the files of a checkpoint hold the trained parameters: one layout per ZeRO stage.

engine/layout.py says the same of an engine's tensors in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmim.engine.layout import cut

PARAMETER_ORDER = "optimizer_parameters"
"""Key of state.json: for each group of the optimizer, the names of its parameters. At stage 0 the optimizer's states
are numbered, and nothing else says which parameter each of them belongs to."""


@dataclass(frozen=True)
class SavedPiece:
    """Consecutive elements of one parameter in a flat tensor of one rank's file."""

    rank: int
    group: int
    start: int
    """Index of the first one in the flat tensor."""
    numel: int


@dataclass
class SavedLayout:
    """The trained parameters of one checkpoint and the tensors that hold them."""

    shapes: dict[str, torch.Size]
    pieces: dict[str, list[SavedPiece]]
    """Of each parameter, in the order of its elements."""
    masters: list[list[torch.Tensor]]
    """The flat fp32 weights, by rank and group."""
    states: list[list[dict[str, Any]]]
    """The optimizer's state, by rank and group: flat tensors as long as the master or longer, and single numbers such
    as `step`."""


def stage_0_layout(model: dict[str, Any], order: list[str] | None, checkpoint: Path) -> SavedLayout:
    """Return the layout of whole tensors, each a group of its own; the optimizer's states are numbered.

    order: names of the parameters by number; None: not known, then the layout has weights only.
    Raises ValueError when the order does not fit the optimizer.
    """
    module = model["module"]
    if order is None:
        names, states = _names_without_order(module, set(model["buffer_names"])), {}
    else:
        names, states = order, model["optimizer"]["state"]
        _check_order_fits(order, model, checkpoint)
    shapes = {name: module[name].shape for name in names}
    pieces = {name: [SavedPiece(0, number, 0, shapes[name].numel())] for number, name in enumerate(names)}
    flat = [
        {key: _flattened(value, shapes[name]) for key, value in states.get(number, {}).items()}
        for number, name in enumerate(names)
    ]
    return SavedLayout(shapes, pieces, [[module[name].flatten() for name in names]], [flat])


def stage_1_2_layout(groups: list[dict[str, torch.Size]], ranks: list[dict[str, Any]]) -> SavedLayout:
    """Return the layout of stages 1 and 2: each group is one flat tensor, cut into equal parts, one per rank.

    groups: the parameters of each group in the order of the flat tensor. The files' param_slice_mappings are not used:
    with round_robin_gradients they follow the order before the parameters were reordered (DeepSpeed 0.19).
    """
    shapes = {name: shape for group in groups for name, shape in group.items()}
    pieces: dict[str, list[SavedPiece]] = {}
    gaps, sizes = alignment_gaps(groups, ranks[0]), partition_sizes(ranks[0])
    for number, (group, after, size) in enumerate(zip(groups, gaps, sizes, strict=True)):
        begin = 0
        for (name, shape), gap in zip(group.items(), after, strict=True):
            parts = cut(begin, shape.numel(), size)
            pieces[name] = [SavedPiece(rank, number, start, numel) for rank, start, numel in parts]
            begin += shape.numel() + gap
    masters = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    return SavedLayout(shapes, pieces, masters, [_group_states(rank, len(groups)) for rank in ranks])


def alignment_gaps(groups: list[dict[str, torch.Size]], saved: dict[str, Any]) -> list[list[int]]:
    """Return how many elements of padding follow each parameter of each group in the flat tensors of stage 1 or 2."""
    return saved.get("param_alignment_paddings") or [[0] * len(group) for group in groups]


def partition_sizes(saved: dict[str, Any]) -> list[int]:
    """Return the length of a rank's part of each group at stage 1 or 2. The file holds it without the padding."""
    masters = saved["single_partition_of_fp32_groups"]
    return [master.numel() + padding for master, padding in zip(masters, saved["group_paddings"], strict=True)]


def stage_3_layout(groups: list[dict[str, torch.Size]], ranks: list[dict[str, Any]]) -> SavedLayout:
    """Return the layout of stage 3: every parameter is cut into pieces of equal length, one per rank.

    The last piece is padded. A rank's flat tensor of a group holds its pieces of all parameters in a row.
    """
    pieces: dict[str, list[SavedPiece]] = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            size = math.ceil(shape.numel() / len(ranks))
            numels = [min(size, shape.numel() - rank * size) for rank in range(len(ranks))]
            pieces[name] = [SavedPiece(rank, group, start, numel) for rank, numel in enumerate(numels) if numel > 0]
            start += size
    shapes = {name: shape for group in groups for name, shape in group.items()}
    masters = [rank["fp32_flat_groups"] for rank in ranks]
    return SavedLayout(shapes, pieces, masters, [_group_states(rank, len(groups)) for rank in ranks])


def torch_optimizer_state(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the state_dict of torch's optimizer from a rank's file of stage 1, 2 or 3."""
    return saved["optimizer_state_dict"] if saved["zero_stage"] == 3 else saved["base_optimizer_state"]


def _flattened(value: Any, shape: torch.Size) -> Any:
    """Return a state of the optimizer flat if it has the parameter's shape, else as it is."""
    return value.flatten() if torch.is_tensor(value) and value.shape == shape else value


def _names_without_order(module: dict[str, Any], buffers: set[str]) -> list[str]:
    """Return the module's parameters, one that is stored under several names only once, under the first."""
    first = {tensor.data_ptr() or name: name for name, tensor in reversed(module.items()) if torch.is_tensor(tensor)}
    parameters = set(first.values()) - buffers
    return [name for name in module if name in parameters]


def _check_order_fits(order: list[str], model: dict[str, Any], checkpoint: Path) -> None:
    count = sum(len(group["params"]) for group in model["optimizer"]["param_groups"])
    if len(order) != count or not set(order) <= model["module"].keys():
        raise ValueError(
            f"{checkpoint / 'state.json'}: {PARAMETER_ORDER} does not name the optimizer's {count} parameters; restore "
            "the file"
        )


def _group_states(saved: dict[str, Any], groups: int) -> list[dict[str, Any]]:
    """Return the state of each group or sub-group, which torch steps as one flat tensor; {}: it was never stepped."""
    state = torch_optimizer_state(saved)["state"]
    return [state.get(number, {}) for number in range(groups)]

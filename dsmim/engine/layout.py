"""Which flat tensors a rank's optimizer steps in a freshly made engine, and which parameters they hold.

One layout per ZeRO stage; checkpoint/saved_layout.py says the same of files. What they rely on in DeepSpeed 0.19:

    stage 1, 2  single_partition_of_fp32_groups, one per group: this rank's partition_size elements of the group's flat
                tensor, with the parameters round_robin_bit16_groups at round_robin_bit16_offsets
                (runtime/zero/stage_1_and_2.py; a parameter's _hp_mapping is wrong with round_robin_gradients)
    stage 3     fp32_partitioned_groups_flat, one per sub-group: its parameters (fp16_groups) in a row, each
                partition_numel() long (runtime/zero/stage3.py)

check_layout compares the values there with those of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsmim.engine.zero_internals import own_part


@dataclass(frozen=True)
class EnginePiece:
    """Consecutive elements of one parameter in a flat tensor of this rank."""

    name: str
    at: int
    """Index of the first one in the flat tensor."""
    start: int
    """Index of the first one in the whole parameter, flattened."""
    numel: int

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a view of the piece's elements in a flat tensor."""
        return flat.view(-1).narrow(0, self.at, self.numel)

    def of_whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the piece's elements of the whole parameter."""
        return parameter.flatten().narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class FlatTensor:
    """A master tensor that this rank's optimizer steps as one; the optimizer's state has tensors of the same shape."""

    master: torch.Tensor
    names: list[str]
    """Parameters of its group, in an order that is the same on every rank, also those of which this rank has no
    elements."""
    pieces: list[EnginePiece]


def flat_tensors(engine: Any, stage: int, rank: int) -> list[FlatTensor]:
    """Return every flat tensor of this rank, group by group. engine: DeepSpeed's."""
    return list(_LAYOUTS[stage](engine, rank))


def check_layout(engine: Any, stage: int, rank: int) -> list[FlatTensor]:
    """Return flat_tensors of an engine that has not stepped yet, after a look at every piece: does the master hold the
    parameter's values? engine: DeepSpeed's; stage: 1, 2 or 3.

    Raises ValueError when DeepSpeed keeps its tensors in another way than described above.
    """
    parameters = {name: p for p, name in engine.param_names.items()}
    try:
        flats = flat_tensors(engine, stage, rank)
        wrong = [
            piece.name
            for flat in flats
            for piece in flat.pieces
            if not torch.equal(piece.of_flat(flat.master).detach().cpu(), _forward_values(parameters, piece, stage))
        ]
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
        raise _unknown_layout(f"{type(error).__name__}: {error}") from None
    if wrong:
        raise _unknown_layout(f"other values than expected where {wrong[0]} should be")
    return flats


def cut(begin: int, numel: int, size: int) -> list[tuple[int, int, int]]:
    """Return where the elements from `begin` are when a flat tensor is cut into parts of `size`: for each part that has
    some, its number, the index of the first one in it, and how many."""
    end = begin + numel
    parts = range(begin // size, -(-end // size)) if numel else ()
    starts = [(part, max(begin - part * size, 0)) for part in parts]
    return [(part, start, min(end - part * size, size) - start) for part, start in starts]


def _forward_values(parameters: dict[str, nn.Parameter], piece: EnginePiece, stage: int) -> torch.Tensor:
    """Return the values of a piece, in host memory, from the weights that the forward pass uses."""
    parameter = parameters[piece.name]
    values = parameter.ds_tensor.narrow(0, 0, piece.numel) if stage == 3 else piece.of_whole(parameter)
    return values.detach().float().cpu()


def _unknown_layout(found: str) -> ValueError:
    import deepspeed

    return ValueError(
        f"optim.name: lamb needs to know which parameters the flat tensors of DeepSpeed's ZeRO hold, and DeepSpeed "
        f"{deepspeed.__version__} keeps them in another way than 0.19, which dsmim knows ({found}); install deepspeed "
        "0.19.8, use ZeRO stage 0 (engine.deepspeed=zero0), or take optim.name=adamw"
    )


def _stage_0(engine: Any, rank: int) -> Iterator[FlatTensor]:
    """Yield each parameter, which is a whole tensor."""
    names = engine.param_names
    for group in engine.optimizer.param_groups:
        for p in group["params"]:
            assert p.is_contiguous()
            yield FlatTensor(p, [names[p]], [EnginePiece(names[p], 0, 0, p.numel())])


def _stage_1_2(engine: Any, rank: int) -> Iterator[FlatTensor]:
    """Yield this rank's partition of each group's flat tensor."""
    optimizer, names = engine.optimizer, engine.param_names
    masters, sizes = optimizer.single_partition_of_fp32_groups, optimizer.partition_size
    groups, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    for master, size, members, begins in zip(masters, sizes, groups, offsets, strict=True):
        assert master.numel() == size
        pieces = []
        for p, begin in zip(members, begins, strict=True):
            own = [(at, numel) for part, at, numel in cut(begin, p.numel(), size) if part == rank]
            pieces += [EnginePiece(names[p], at, rank * size + at - begin, numel) for at, numel in own]
        yield FlatTensor(master, [names[p] for p in members], pieces)


def _stage_3(engine: Any, rank: int) -> Iterator[FlatTensor]:
    """Yield the flat tensor of each sub-group: this rank's pieces of its parameters."""
    optimizer, names = engine.optimizer, engine.param_names
    for master, members in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces, at = [], 0
        for p in members:
            start, numel = own_part(p, rank)
            pieces.append(EnginePiece(names[p], at, start, numel))
            at += p.partition_numel()
        assert at == master.numel(), "a sub-group is not its parameters' pieces in a row"
        yield FlatTensor(master, [names[p] for p in members], [piece for piece in pieces if piece.numel > 0])


_LAYOUTS: dict[int, Callable[[Any, int], Iterator[FlatTensor]]] = {
    0: _stage_0,
    1: _stage_1_2,
    2: _stage_1_2,
    3: _stage_3,
}

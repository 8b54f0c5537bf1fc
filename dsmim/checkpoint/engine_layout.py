"""Which flat tensors a rank's optimizer steps in a freshly made engine, and which parameters they hold.

One layout per ZeRO stage; saved_layout.py says the same of files. What they rely on in DeepSpeed 0.19:

    stage 1, 2  single_partition_of_fp32_groups, one per group: this rank's partition_size elements of the group's flat
                tensor, with the parameters round_robin_bit16_groups at round_robin_bit16_offsets
                (runtime/zero/stage_1_and_2.py; a parameter's _hp_mapping is wrong with round_robin_gradients)
    stage 3     fp32_partitioned_groups_flat, one per sub-group: its parameters (fp16_groups) in a row, each
                partition_numel() long (runtime/zero/stage3.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dsmim.checkpoint.saved_layout import cut
from dsmim.engine.zero import Engine
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
    """Parameters of its group, also those of which this rank has no elements."""
    pieces: list[EnginePiece]


def flat_tensors(engine: Engine, rank: int) -> list[FlatTensor]:
    """Return every flat tensor of this rank, group by group."""
    return list(_LAYOUTS[engine.stage](engine, rank))


def _stage_0(engine: Engine, rank: int) -> Iterator[FlatTensor]:
    """Yield each parameter, which is a whole tensor."""
    names = engine.deepspeed.param_names
    for group in engine.optimizer.param_groups:
        for p in group["params"]:
            assert p.is_contiguous()
            yield FlatTensor(p, [names[p]], [EnginePiece(names[p], 0, 0, p.numel())])


def _stage_1_2(engine: Engine, rank: int) -> Iterator[FlatTensor]:
    """Yield this rank's partition of each group's flat tensor."""
    optimizer, names = engine.deepspeed.optimizer, engine.deepspeed.param_names
    masters, sizes = optimizer.single_partition_of_fp32_groups, optimizer.partition_size
    groups, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    for master, size, members, begins in zip(masters, sizes, groups, offsets, strict=True):
        assert master.numel() == size
        pieces = []
        for p, begin in zip(members, begins, strict=True):
            own = [(at, numel) for part, at, numel in cut(begin, p.numel(), size) if part == rank]
            pieces += [EnginePiece(names[p], at, rank * size + at - begin, numel) for at, numel in own]
        yield FlatTensor(master, [names[p] for p in members], pieces)


def _stage_3(engine: Engine, rank: int) -> Iterator[FlatTensor]:
    """Yield the flat tensor of each sub-group: this rank's pieces of its parameters."""
    optimizer, names = engine.deepspeed.optimizer, engine.deepspeed.param_names
    for master, members in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces, at = [], 0
        for p in members:
            start, numel = own_part(p, rank)
            pieces.append(EnginePiece(names[p], at, start, numel))
            at += p.partition_numel()
        assert at == master.numel(), "a sub-group is not its parameters' pieces in a row"
        yield FlatTensor(master, [names[p] for p in members], [piece for piece in pieces if piece.numel > 0])


_LAYOUTS: dict[int, Callable[[Engine, int], Iterator[FlatTensor]]] = {
    0: _stage_0,
    1: _stage_1_2,
    2: _stage_1_2,
    3: _stage_3,
}

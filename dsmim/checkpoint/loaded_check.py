"""The check after a universal checkpoint was loaded: does the engine now hold what the checkpoint holds?

The checksum of a whole tensor is the sum of the checksums of its parts. So every rank sums what it has, the ranks add
their sums, and each total must equal the checksum in the checkpoint's manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmim.checkpoint.model_check import MAX_LISTED
from dsmim.checkpoint.universal import checksum
from dsmim.engine.layout import FlatTensor
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine
from dsmim.engine.zero_internals import own_part, whole_shape

Item = tuple[str, str]
"""A parameter's name, and a tensor of it: fp32 (the master weight), a key of the optimizer's state, or SHARD."""

SHARD = "shard"
"""At stage 3 a rank's part of the weight that the forward pass gathers."""


def check_loaded(
    universal: Path, manifest: dict[str, Any], engine: Engine, flats: list[FlatTensor], runtime: Runtime
) -> None:
    """Check every tensor of every trained parameter against the manifest's checksums. Collective.

    Raises Stopped that names up to ten different tensors.
    """
    checksums = {name: entry["checksums"] for name, entry in manifest["parameters"].items()}
    trained = {name: p for name, p in engine.module.named_parameters() if name in checksums}
    expected = _expected(checksums, engine.stage)
    found = _found(list(expected), engine, flats, trained, runtime)
    different = [f"{name} ({key})" for name, key in expected if found[name, key] != expected[name, key]]
    different += [f"{name} (gathered)" for name, p in _gathered(trained) if checksum(p) != checksums[name]["fp32"]]
    with runtime.all_or_none():
        if different:
            raise ValueError(
                f"{universal}: these tensors differ after loading: {', '.join(different[:MAX_LISTED])}; remove that "
                "folder and start again"
            )


def _expected(checksums: dict[str, dict[str, int]], stage: int) -> dict[Item, int]:
    expected = {(name, key): value for name, by_key in checksums.items() for key, value in by_key.items()}
    if stage == 3:
        expected |= {(name, SHARD): by_key["fp32"] for name, by_key in checksums.items()}
    return expected


def _found(
    items: list[Item], engine: Engine, flats: list[FlatTensor], trained: dict[str, nn.Parameter], runtime: Runtime
) -> dict[Item, int]:
    """Return the checksums of what all ranks have together. Collective."""
    own = dict.fromkeys(items, 0)
    for item, tensor in _own_tensors(engine, flats, trained, runtime.rank):
        own[item] += checksum(tensor)
    sums = torch.tensor(list(own.values()), dtype=torch.int64, device=runtime.device)
    if engine.stage:  # at stage 0 every rank has everything
        runtime.sum(sums)
    return dict(zip(own, sums.tolist(), strict=True))


def _own_tensors(
    engine: Engine, flats: list[FlatTensor], trained: dict[str, nn.Parameter], rank: int
) -> Iterator[tuple[Item, torch.Tensor]]:
    """Yield this rank's elements, without padding. At stages 1 to 3 no two ranks have the same element."""
    for flat in flats:
        for key, tensor in {"fp32": flat.master, **engine.optimizer.state.get(flat.master, {})}.items():
            if torch.is_tensor(tensor) and tensor.shape == flat.master.shape:
                yield from (((piece.name, key), piece.of_flat(tensor)) for piece in flat.pieces)
    if engine.stage == 3:
        for name, parameter in trained.items():
            yield (name, SHARD), parameter.ds_tensor.narrow(0, 0, own_part(parameter, rank)[1])


def _gathered(trained: dict[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are whole on this rank: the forward pass uses them as they are."""
    return ((name, p) for name, p in trained.items() if p.numel() == whole_shape(p).numel())

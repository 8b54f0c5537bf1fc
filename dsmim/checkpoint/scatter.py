"""A universal checkpoint into a freshly made engine: to each rank the pieces that it keeps, at any ZeRO stage.

DeepSpeed's own ways do not serve. Its `checkpoint.load_universal` gives all groups one group's settings and one step
counter at stage 3, knows of no moving average there, refuses another stage, and at stages 1 and 2 fails where a rank
has no element of a group. `safe_set_local_optimizer_state` and its like write to a state that torch's optimizer does
not have before its first step, `safe_set_full_*` lose the end of a parameter that the ranks do not divide evenly,
and none of them touches the weights that the forward pass uses. So the flat tensors are written, as DeepSpeed's loading
of its own checkpoints does. What that relies on (0.19):

    stage 1, 2  single_partition_of_fp32_groups, one per group; _hp_mapping of a parameter that has elements in this
                rank's; update_lp_params() (runtime/zero/stage_1_and_2.py)
    stage 3     fp32_partitioned_groups_flat, one per sub-group, of fp16_groups' parameters one after the other, each
                partition_numel() long; the checkpoint events, _reassign_or_swap_out_partitioned_parameters()
                (runtime/zero/stage3.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmim.checkpoint.universal import checksum, read_manifest, read_module, read_parameter
from dsmim.engine.construct import saved_buffers
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine, group_members, own_part

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements in a flat tensor of this rank."""

    name: str
    at: int
    """Where it begins in the flat tensor."""
    start: int
    """Where it begins in the parameter."""
    numel: int


@dataclass(frozen=True)
class Flat:
    """A tensor that this rank's optimizer steps as one."""

    master: torch.Tensor
    names: list[str]
    """Parameters of its group, whether this rank has elements of them or not."""
    pieces: list[Piece]


def place(universal: Path, engine: Engine, runtime: Runtime) -> None:
    """Give an engine that has not stepped yet a checkpoint's weights, moments, moving average, step counters and
    buffers. The groups' settings (rates, decay) stay the engine's. Collective.

    Raises Stopped when the checkpoint is another model's, or cannot be read.
    """
    manifest = runtime.on_rank_zero(lambda: read_manifest(universal))
    with runtime.all_or_none():
        _check_fit(universal, manifest, engine)
    if engine.stage == 3:
        engine.deepspeed.optimizer.checkpoint_event_prologue()  # gathered weights would hide new shards
    flats = list(_LAYOUTS[engine.stage](engine, runtime.rank))
    with torch.no_grad():
        with runtime.all_or_none():
            _place_all(universal, manifest, engine, flats, runtime.rank)
        _refresh(engine)
    for counter, value in manifest["counters"].items():
        setattr(engine.deepspeed, counter, value)  # not micro_steps: a checkpoint lies between two steps
    _check_placed(universal, manifest, engine, flats, runtime)
    engine.restored()


def _check_fit(universal: Path, manifest: Manifest, engine: Engine) -> None:
    """That the checkpoint has what the model has, and nothing else."""
    trained = {name for names in group_members(engine.deepspeed, engine.stage) for name in names}
    shapes = {name: list(_shape(parameter)) for name, parameter in engine.module.named_parameters()}
    kinds = {
        "parameter that is trained": (_shapes(manifest["parameters"]), {n: shapes[n] for n in shapes if n in trained}),
        "frozen parameter": (manifest["frozen"], {n: shapes[n] for n in shapes if n not in trained}),
        "buffer": (
            manifest["buffers"],
            {name: list(buffer.shape) for name, buffer in saved_buffers(engine.module).items()},
        ),
    }
    faults = [fault for kind, (saved, own) in kinds.items() for fault in _differences(kind, saved, own)]
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:10])
        raise ValueError(f"{universal}: is of another model; restore the recipe's model section:{listed}{more}")
    _check_swapped(engine)


def _differences(kind: str, saved: dict[str, list[int]], own: dict[str, list[int]]) -> list[str]:
    missing = [f"{name}: the checkpoint has no such {kind}" for name in own if name not in saved]
    extra = [f"{name}: this run's model has no such {kind}" for name in saved if name not in own]
    both = [name for name in own if name in saved and own[name] != saved[name]]
    return [*missing, *extra, *(f"{name}: has shape {saved[name]}, here {own[name]}" for name in both)]


def _check_swapped(engine: Engine) -> None:
    optimizer = engine.deepspeed.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ValueError(
            "engine.deepspeed: with weights or optimizer offloaded to NVMe a run goes on with the number of ranks and "
            "the ZeRO stage of its checkpoint only"
        )


def _whole_parameters(engine: Engine, rank: int) -> Iterable[Flat]:
    names = engine.deepspeed.param_names
    for group in engine.optimizer.param_groups:
        for p in group["params"]:
            assert p.is_contiguous()
            yield Flat(p, [names[p]], [Piece(names[p], 0, 0, p.numel())])


def _partitions(engine: Engine, rank: int) -> Iterable[Flat]:
    optimizer, names = engine.deepspeed.optimizer, engine.deepspeed.param_names
    for master, members in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        pieces = []
        for p in members:
            if p._hp_mapping is not None:
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                assert here.numel == there.numel and here.start + here.numel <= master.numel()
                pieces.append(Piece(names[p], here.start, there.start, here.numel))
        yield Flat(master, [names[p] for p in members], pieces)


def _sub_groups(engine: Engine, rank: int) -> Iterable[Flat]:
    optimizer, names = engine.deepspeed.optimizer, engine.deepspeed.param_names
    for master, members in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces, at = [], 0
        for p in members:
            start, numel = own_part(p, rank)
            pieces.append(Piece(names[p], at, start, numel))
            at += p.partition_numel()
        assert at == master.numel(), "a sub-group is not its parameters' pieces in a row"
        yield Flat(master, [names[p] for p in members], [piece for piece in pieces if piece.numel > 0])


_LAYOUTS: dict[int, Callable[[Engine, int], Iterable[Flat]]] = {
    0: _whole_parameters,
    1: _partitions,
    2: _partitions,
    3: _sub_groups,
}


def _place_all(universal: Path, manifest: Manifest, engine: Engine, flats: list[Flat], rank: int) -> None:
    for flat in flats:
        _fill_weights(universal, flat)
        _fill_state(universal, manifest["parameters"], flat, engine.optimizer)
    module = read_module(universal)
    for name, buffer in saved_buffers(engine.module).items():
        buffer.copy_(module[name])
    for name, parameter in engine.module.named_parameters():
        if name in manifest["frozen"]:
            _fill_frozen(parameter, module[name].flatten(), rank)


def _fill_weights(universal: Path, flat: Flat) -> None:
    flat.master.zero_()  # the padding too: what memory held would be saved
    for piece in flat.pieces:
        _narrow(flat.master, piece).copy_(_read(universal, piece, "fp32"))


def _fill_state(universal: Path, parameters: dict[str, Any], flat: Flat, optimizer: torch.optim.Optimizer) -> None:
    """As if the optimizer had made it: a step counter of each flat tensor's own, which torch counts up in place."""
    keys = [key for key in parameters[flat.names[0]]["checksums"] if key != "fp32"]
    steps = {parameters[name]["step"] for name in flat.names} - {None}
    assert len(steps) <= 1, f"{flat.names} are stepped as one and were stepped {steps} times"
    state = optimizer.state[flat.master] if keys else {}
    for step in steps:
        state["step"] = _step_counter(optimizer, flat.master, step)
    for key in keys:
        state[key] = torch.zeros_like(flat.master, requires_grad=False)
        for piece in flat.pieces:
            _narrow(state[key], piece).copy_(_read(universal, piece, key))


def _step_counter(optimizer: torch.optim.Optimizer, master: torch.Tensor, step: float) -> torch.Tensor:
    """On the device where torch's kernels count themselves (fused, capturable), else in host memory."""
    counts_there = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
    return torch.tensor(step, dtype=torch.float32, device=master.device if counts_there else "cpu")


def _fill_frozen(parameter: nn.Parameter, value: torch.Tensor, rank: int) -> None:
    if hasattr(parameter, "ds_tensor"):
        start, numel = own_part(parameter, rank)
        parameter.ds_tensor.narrow(0, 0, numel).copy_(value.narrow(0, start, numel))
    else:
        parameter.copy_(value.view(parameter.shape))


def _refresh(engine: Engine) -> None:
    """The weights that the forward pass uses, from the masters. Collective. At stage 0 they are the masters."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    elif engine.stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that are never released


def _check_placed(universal: Path, manifest: Manifest, engine: Engine, flats: list[Flat], runtime: Runtime) -> None:
    """Compare what lies in the engine with the checksums. Collective; raises Stopped naming what differs."""
    checksums = {name: entry["checksums"] for name, entry in manifest["parameters"].items()}
    wanted = {(name, key): value for name, by_key in checksums.items() for key, value in by_key.items()}
    if engine.stage == 3:
        wanted |= {(name, "shard"): by_key["fp32"] for name, by_key in checksums.items()}
    held = dict.fromkeys(wanted, 0)
    trained = [(name, p) for name, p in engine.module.named_parameters() if name in checksums]
    for name, key, tensor in _held(engine, flats, trained, runtime.rank):
        held[name, key] += checksum(tensor)
    sums = torch.tensor(list(held.values()), dtype=torch.int64, device=runtime.device)
    if engine.stage:
        runtime.sum(sums)
    faults = [
        f"{name} ({key})" for (name, key), found in zip(held, sums.tolist(), strict=True) if found != wanted[name, key]
    ]
    whole = [(name, p) for name, p in trained if p.numel() == _shape(p).numel()]  # that the forward pass will use
    faults += [f"{name} (gathered)" for name, p in whole if checksum(p) != checksums[name]["fp32"]]
    with runtime.all_or_none():
        _refuse(universal, faults)


def _held(
    engine: Engine, flats: list[Flat], trained: list[tuple[str, nn.Parameter]], rank: int
) -> Iterable[tuple[str, str, torch.Tensor]]:
    """Parameter, key and this rank's elements, of all that the ranks have together once."""
    for flat in flats:
        for key, tensor in {"fp32": flat.master, **engine.optimizer.state.get(flat.master, {})}.items():
            yield from ((piece.name, key, _narrow(tensor, piece)) for piece in flat.pieces if key != "step")
    if engine.stage == 3:
        for name, parameter in trained:
            yield name, "shard", parameter.ds_tensor.narrow(0, 0, own_part(parameter, rank)[1])


def _refuse(universal: Path, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"{universal}: did not arrive as written: {', '.join(faults[:10])}; remove it and start again")


def _read(universal: Path, piece: Piece, key: str) -> torch.Tensor:
    return read_parameter(universal, piece.name, key).flatten().narrow(0, piece.start, piece.numel)


def _narrow(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    return flat.view(-1).narrow(0, piece.at, piece.numel)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _shapes(parameters: dict[str, Any]) -> dict[str, list[int]]:
    return {name: entry["shape"] for name, entry in parameters.items()}

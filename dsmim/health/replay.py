"""Replay bundles: the batches of a step whose loss or gradient was not finite, kept to compute the step again.

RUN/replay/step_00001234/rank_0.safetensors   the tensors of this rank's micro batches, as the model saw them
RUN/replay/step_00001234/rank_0.json          everything else (sample keys, seeds, loss, recipe); written last
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dsmim import strict_json

BUNDLES = 3  # steps kept per run: the first ones show what is wrong


def write(
    folder: Path, step: int, rank: int, micro_batches: Sequence[Mapping[str, Any]], info: Mapping[str, Any]
) -> Path | str:
    """Write a rank's micro batches of `step`, and `info` beside them, to folder/step_XXXXXXXX.

    Return that folder; or a sentence that says why nothing was written: three steps are there already, or the disk
    fails. A replay bundle is never a reason to stop a run.
    """
    bundle = folder / f"step_{step:08d}"
    kept = [path for path in folder.glob("step_*") if path != bundle]
    if len(kept) >= BUNDLES:
        return f"no replay bundle of step {step}: {folder} has {len(kept)} already"
    tensors, others = _separate(micro_batches)
    content = {**info, "step": step, "rank": rank, "micro_batches": others}
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        _put(bundle / f"rank_{rank}.safetensors", safetensors.torch.save(tensors))
        _put(bundle / f"rank_{rank}.json", (strict_json.dumps(content, indent=1, default=str) + "\n").encode())
    except OSError as error:
        return f"no replay bundle of step {step}: {bundle} cannot be written ({error.strerror})"
    return bundle


def read(bundle: Path, rank: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read a rank's micro batches and the info beside them.

    The tensors are bit for bit those of the run, with the same memory layout. Raises ValueError when the bundle holds
    none of this rank, or when a file is damaged.
    """
    try:
        info = strict_json.loads((bundle / f"rank_{rank}.json").read_text())
        tensors = safetensors.torch.load((bundle / f"rank_{rank}.safetensors").read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{bundle}: holds no replay of rank {rank} ({error})") from None
    batches = info.pop("micro_batches")
    for number, batch in enumerate(batches):
        layouts = batch.pop("channels_last")
        for name in batch.pop("tensors"):
            tensor = tensors[f"{number}/{name}"]
            batch[name] = tensor.contiguous(memory_format=torch.channels_last) if name in layouts else tensor
    return batches, info


def _separate(micro_batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the tensors, by "micro batch/name", and for each micro batch everything else."""
    tensors, others = {}, []
    for number, batch in enumerate(micro_batches):
        own = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"{number}/{name}": value.detach().cpu().contiguous() for name, value in own.items()}
        # The memory layout decides the order in which kernels add, and so the last bits of the loss.
        last = [name for name, value in own.items() if value.ndim == 4 and _is_channels_last(value)]
        rest = {name: value for name, value in batch.items() if name not in own}
        others.append({**rest, "tensors": sorted(own), "channels_last": last})
    return tensors, others


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _put(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise

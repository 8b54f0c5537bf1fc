"""What a step saw whose loss or gradient was not finite, kept so that it can be computed again elsewhere.

RUN/replay/step_00001234/rank_0.safetensors   the tensors of this rank's micro batches, as the model saw them
RUN/replay/step_00001234/rank_0.json          everything else: sample keys, seeds, loss, recipe; written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

BUNDLES = 3  # steps kept per run: what is wrong shows in the first ones


def write(
    folder: Path, step: int, rank: int, micro_batches: Sequence[Mapping[str, Any]], info: Mapping[str, Any]
) -> Path | str:
    """Keep a rank's micro batches of `step`, and `info` beside them, in folder/step_XXXXXXXX.

    Gives where they are; or, in a sentence, why they are not: there are three already, or the disk refuses.
    """
    bundle = folder / f"step_{step:08d}"
    others = [path for path in folder.glob("step_*") if path != bundle]
    if len(others) >= BUNDLES:
        return f"no replay bundle of step {step}: {folder} has {len(others)} already"
    tensors, said = _separate(micro_batches)
    told = {**info, "step": step, "rank": rank, "micro_batches": said}
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        _put(bundle / f"rank_{rank}.safetensors", safetensors.torch.save(tensors))
        _put(bundle / f"rank_{rank}.json", (json.dumps(told, indent=1, default=str) + "\n").encode())
    except OSError as error:
        return f"no replay bundle of step {step}: {bundle} cannot be written ({error.strerror})"
    return bundle


def read(bundle: Path, rank: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The micro batches of a rank, bit for bit and laid out in memory as they were, and what was told beside them.

    Raises ValueError when the rank left none.
    """
    try:
        told = json.loads((bundle / f"rank_{rank}.json").read_text())
        tensors = safetensors.torch.load((bundle / f"rank_{rank}.safetensors").read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{bundle}: holds no replay of rank {rank} ({error})") from None
    batches = told.pop("micro_batches")
    for number, batch in enumerate(batches):
        layouts = batch.pop("channels_last")
        for name in batch.pop("tensors"):
            tensor = tensors[f"{number}/{name}"]
            batch[name] = tensor.contiguous(memory_format=torch.channels_last) if name in layouts else tensor
    return batches, told


def _separate(micro_batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors by micro batch and name, and for each micro batch what is none."""
    tensors, said = {}, []
    for number, batch in enumerate(micro_batches):
        own = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"{number}/{name}": value.detach().cpu().contiguous() for name, value in own.items()}
        # The layout decides in which order kernels add, hence the last bits.
        last = [name for name, value in own.items() if value.ndim == 4 and _is_channels_last(value)]
        rest = {name: value for name, value in batch.items() if name not in own}
        said.append({**rest, "tensors": sorted(own), "channels_last": last})
    return tensors, said


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _put(path: Path, data: bytes) -> None:
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

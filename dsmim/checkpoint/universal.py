"""A checkpoint as DeepSpeed's universal one: whole parameters, whatever number of ranks and ZeRO stage wrote it.

    OUT/zero/NAME/{fp32,exp_avg,exp_avg_sq,ema}.pt, step.pt   one trained parameter: {"param": tensor, "cat_dim": 0}
    OUT/zero/optimizer_state.pt                               the optimizer's groups
    OUT/mp_rank_00_model_states.pt                            buffers, frozen parameters, DeepSpeed's counters
    OUT/manifest.json                                         the checkpoint it was made of, shapes, checksums, digests

It is made from a checkpoint that stays, so nothing here is fsynced: what a crash leaves behind is found damaged by its
digests and made again. scatter.py brings it into an engine.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsmim.checkpoint.reading import MANIFEST, check_files
from dsmim.checkpoint.saving import fresh_folder
from dsmim.checkpoint.zero_shards import Shards
from dsmim.engine.digest import Entry, Hashed, sha256
from dsmim.engine.runtime import Runtime

FORMAT = 1
MODEL = "mp_rank_00_model_states.pt"
_BAR_EVERY = 10
"""Seconds between two states of the progress bar, which in a batch job's log are lines."""

Files = dict[str, Entry]
"""By name in the folder."""


def convert(checkpoint: Path, out: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Make `out` from a finished checkpoint, unless an earlier start has: ranks share the parameters. Collective.

    say: where rank 0 reports. Raises Stopped when the checkpoint cannot be read or a disk refuses.
    """
    source = runtime.on_rank_zero(lambda: _identity(checkpoint))
    if _is_made(out, source, runtime, say):
        return
    partial = out.with_name(f".partial_{out.name}")
    runtime.on_rank_zero(lambda: fresh_folder(partial))
    with runtime.all_or_none():
        shards = Shards(checkpoint)
    say(f"{checkpoint.name} of {shards.world_size} ranks at ZeRO stage {shards.stage} becomes {out}")
    try:
        with runtime.all_or_none():
            shares = runtime.gather(_write_share(shards, partial, runtime))
            runtime.on_rank_zero(lambda: _publish(shards, source, shares, partial, out))
    except ValueError as error:
        runtime.on_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))  # make room
        raise type(error)(f"{checkpoint} could not be converted; it stands as it was. {error}") from None


def read_manifest(universal: Path) -> dict[str, Any]:
    """manifest.json of a universal checkpoint. Raises ValueError when it is none.

    source: what it was made of; parameters: name → shape, step (None: never stepped), checksums by key; frozen and
    buffers: name → shape; counters: DeepSpeed's; files.
    """
    try:
        manifest = json.loads((universal / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{universal}: no universal checkpoint of dsmim ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "parameters" not in manifest:
        raise ValueError(f"{universal}: no universal checkpoint of the format that this dsmim reads ({FORMAT})")
    return manifest


def read_parameter(universal: Path, name: str, key: str) -> torch.Tensor:
    """One tensor of a trained parameter, mapped into memory. Raises ValueError when it cannot be read."""
    return _read(universal / "zero" / name / f"{key}.pt")["param"]


def read_module(universal: Path) -> dict[str, torch.Tensor]:
    """Buffers and frozen parameters by name. Raises ValueError when they cannot be read."""
    return _read(universal / MODEL)["module"]


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a 4-byte tensor's words as integers: exact, the same bits for the same bits, and of a whole what it is
    of its parts together."""
    return int(tensor.detach().flatten().view(torch.int32).sum(dtype=torch.int64))


def _identity(checkpoint: Path) -> str:
    """A checkpoint's manifest holds the digests of all its files: its own digest names the checkpoint."""
    try:
        return sha256(checkpoint / MANIFEST)
    except OSError as error:
        raise ValueError(f"{checkpoint / MANIFEST}: cannot be read ({error.strerror})") from None


def _is_made(out: Path, source: str, runtime: Runtime, say: Callable[[str], None]) -> bool:
    """Whether `out` is of this very checkpoint and every file is as it was written. Collective."""
    if not runtime.on_rank_zero(lambda: _made_of(out) == source):
        return False
    faults = [fault for fault in runtime.gather(check_files(out, runtime.rank, runtime.world_size)) if fault]
    if faults:
        say(f"{out} is made anew: {faults[0]}")
    return not faults


def _made_of(out: Path) -> str | None:
    try:
        return read_manifest(out)["source"]
    except (ValueError, KeyError):
        return None


def _write_share(shards: Shards, partial: Path, runtime: Runtime) -> tuple[dict[str, Any], Files]:
    """This rank's parameters, and on rank 0 what there is once: what the manifest says of them, and of the files."""
    files = _Files(partial)
    mine = shards.names[runtime.rank :: runtime.world_size]
    shown = {"unit": "parameter", "mininterval": _BAR_EVERY, "file": sys.stderr, "disable": not runtime.is_rank_zero}
    steps = shards.steps
    parameters = {
        name: _write_parameter(shards, name, steps.get(name), files) for name in tqdm(mine, "converting", **shown)
    }
    if runtime.is_rank_zero:
        _write_common(shards, steps, files)
    return parameters, files.written


def _write_parameter(shards: Shards, name: str, step: float | None, files: _Files) -> dict[str, Any]:
    checksums = {}
    for key in shards.keys:
        tensor = shards.tensor(name, key)
        checksums[key] = checksum(tensor)
        files.write(f"zero/{name}/{key}.pt", {"param": tensor, "cat_dim": 0})
    if step is not None:
        files.write(f"zero/{name}/step.pt", torch.tensor(step))
    return {"shape": list(shards.shapes[name]), "step": step, "checksums": checksums}


def _write_common(shards: Shards, steps: dict[str, float], files: _Files) -> None:
    """What DeepSpeed's own loaders look for: stage 3's takes everybody's step, and one group's settings for all, from
    the nested state."""
    first = {
        "state": {0: {"step": torch.tensor(max(steps.values(), default=0.0))}},
        "param_groups": shards.param_groups,
    }
    common = {"ds_version": shards.header["ds_version"], "param_groups": shards.param_groups}
    files.write("zero/optimizer_state.pt", common | {"optimizer_state_dict": first})
    module = shards.buffers | {name: shards.tensor(name) for name in shards.frozen}
    files.write(MODEL, shards.header | {"module": module})


class _Files:
    """Writes files into a folder and keeps their digests. Raises ValueError when the disk refuses."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: Files = {}

    def write(self, name: str, value: Any) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(value, hashed := Hashed(file))
                self.written[name] = hashed.end(sync=False)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def _publish(shards: Shards, source: str, shares: list[tuple[dict[str, Any], Files]], partial: Path, out: Path) -> None:
    counters = ("global_steps", "global_samples", "skipped_steps")
    manifest = {
        "format": FORMAT,
        "source": source,
        "counters": {key: shards.header[key] for key in counters},
        "parameters": {name: entry for parameters, _ in shares for name, entry in parameters.items()},
        "frozen": {name: list(shards.shapes[name]) for name in shards.frozen},
        "buffers": {name: list(value.shape) for name, value in shards.buffers.items()},
        "files": {name: entry for _, files in shares for name, entry in files.items()},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None

"""Converts a checkpoint to DeepSpeed's universal layout: whole parameters, from any number of ranks and any ZeRO stage.

    OUT/zero/NAME/{fp32,exp_avg,exp_avg_sq,ema}.pt, step.pt   one trained parameter: {"param": tensor, "cat_dim": 0}
    OUT/zero/optimizer_state.pt                               the optimizer's groups
    OUT/mp_rank_00_model_states.pt                            buffers, frozen parameters, DeepSpeed's counters
    OUT/manifest.json                                         the source checkpoint, shapes, checksums, digests

The files of the moments have the names that the optimizer gives them.

The source checkpoint is kept, so nothing here is fsynced: if a crash damages files, their digests show it and the
conversion is made again. universal_loading.py loads the result into an engine.
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
from dsmim.checkpoint.zero_shards import MODEL_FILE, ZeroShards, load_file
from dsmim.engine.digest import FileEntry, HashingFile, sha256
from dsmim.engine.runtime import Runtime
from dsmim.log import counted

UNIVERSAL_FORMAT = 2
_BAR_EVERY = 10
"""Seconds between two updates of the progress bar: each is a line in a batch job's log."""

Entries = dict[str, FileEntry]
"""Size and digest of files, by name in the folder."""


def convert(checkpoint: Path, out: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Convert a finished checkpoint to `out`, unless an earlier start has done so. Collective: each rank converts its
    share of the parameters.

    say: where rank 0 reports. Raises Stopped when the checkpoint cannot be read or `out` cannot be written.
    """
    source = runtime.on_rank_zero(lambda: _identity(checkpoint))
    if _is_converted(out, source, runtime, say):
        return
    partial = out.with_name(f".partial_{out.name}")
    runtime.on_rank_zero(lambda: fresh_folder(partial))
    with runtime.all_or_none():
        shards = ZeroShards(checkpoint)
    say(f"converting {checkpoint.name} of {counted(shards.world_size, 'rank')} at ZeRO stage {shards.stage} to {out}")
    try:
        with runtime.all_or_none():
            shares = runtime.gather(_write_share(shards, partial, runtime))
            runtime.on_rank_zero(lambda: _publish_folder(shards, source, shares, partial, out))
    except ValueError as error:
        runtime.on_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))  # free the disk space
        raise type(error)(f"{checkpoint} could not be converted; it is unchanged. {error}") from None


def read_manifest(universal: Path) -> dict[str, Any]:
    """Return manifest.json of a universal checkpoint. Raises ValueError when the folder is no such checkpoint.

    source: digest that names the converted checkpoint; parameters: name → shape, checksums by key, and scalars, what
    the optimizer keeps once per tensor (key → value and dtype, None: no tensor; {}: it was never stepped); frozen and
    buffers: name → shape; counters: DeepSpeed's; files: name → size and digest.
    """
    try:
        manifest = json.loads((universal / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{universal}: is not a universal checkpoint of dsmim ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != UNIVERSAL_FORMAT or "parameters" not in manifest:
        raise ValueError(f"{universal}: is not a universal checkpoint of format {UNIVERSAL_FORMAT}, which dsmim reads")
    return manifest


def read_parameter(universal: Path, name: str, key: str) -> torch.Tensor:
    """Return one tensor of a trained parameter, mapped into memory. Raises ValueError when it cannot be read."""
    return load_file(universal / "zero" / name / f"{key}.pt")["param"]


def read_module(universal: Path) -> dict[str, torch.Tensor]:
    """Return buffers and frozen parameters by name. Raises ValueError when they cannot be read."""
    return load_file(universal / MODEL_FILE)["module"]


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's 4-byte words, read as integers.

    It is exact, depends on the bits alone, and the checksum of a whole is the sum of the checksums of its parts.
    """
    return int(tensor.detach().flatten().view(torch.int32).sum(dtype=torch.int64))


def _identity(checkpoint: Path) -> str:
    """Return the manifest's digest. It identifies the checkpoint: the manifest holds the digests of all files."""
    try:
        return sha256(checkpoint / MANIFEST)
    except OSError as error:
        raise ValueError(f"{checkpoint / MANIFEST}: cannot be read ({error.strerror})") from None


def _is_converted(out: Path, source: str, runtime: Runtime, say: Callable[[str], None]) -> bool:
    """Say whether `out` was converted from this very checkpoint and every file is as it was written. Collective."""
    if not runtime.on_rank_zero(lambda: _source_of(out) == source):
        return False
    with runtime.all_or_none():
        faults = [fault for fault in runtime.gather(check_files(out, runtime.rank, runtime.world_size)) if fault]
    if faults:
        say(f"{out} is converted again: {faults[0]}")
    return not faults


def _source_of(out: Path) -> str | None:
    try:
        return read_manifest(out)["source"]
    except (ValueError, KeyError):
        return None


def _write_share(shards: ZeroShards, partial: Path, runtime: Runtime) -> tuple[dict[str, Any], Entries]:
    """Write this rank's parameters, and on rank 0 the files that exist once. Return the manifest's entries of these
    parameters and files."""
    files = _FileWriter(partial)
    own = shards.names[runtime.rank :: runtime.world_size]
    bar = {"unit": "parameter", "mininterval": _BAR_EVERY, "file": sys.stderr, "disable": not runtime.is_rank_zero}
    scalars = shards.scalars
    parameters = {name: _write_parameter(shards, name, scalars[name], files) for name in tqdm(own, "converting", **bar)}
    if runtime.is_rank_zero:
        _write_common(shards, [float(found["step"]) for found in scalars.values() if "step" in found], files)
    return parameters, files.written


def _write_parameter(shards: ZeroShards, name: str, scalars: dict[str, Any], files: _FileWriter) -> dict[str, Any]:
    checksums = {}
    for key in shards.keys:
        tensor = shards.tensor(name, key)
        checksums[key] = checksum(tensor)
        files.write(f"zero/{name}/{key}.pt", {"param": tensor, "cat_dim": 0})
    if "step" in scalars:
        files.write(f"zero/{name}/step.pt", torch.tensor(float(scalars["step"])))
    kept = {key: _stored_scalar(value) for key, value in scalars.items()}
    return {"shape": list(shards.shapes[name]), "scalars": kept, "checksums": checksums}


def _stored_scalar(value: Any) -> dict[str, Any]:
    """Return a single number as the manifest has it. JSON keeps every digit of a float."""
    if torch.is_tensor(value):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return {"value": value, "dtype": None}


def _write_common(shards: ZeroShards, steps: list[float], files: _FileWriter) -> None:
    """Write what DeepSpeed's own loaders expect. The one of stage 3 takes the step of all parameters, and the settings
    of all groups, from the nested state."""
    nested = {
        "state": {0: {"step": torch.tensor(max(steps, default=0.0))}},
        "param_groups": shards.param_groups,
    }
    common = {"ds_version": shards.header["ds_version"], "param_groups": shards.param_groups}
    files.write("zero/optimizer_state.pt", common | {"optimizer_state_dict": nested})
    module = shards.buffers | {name: shards.tensor(name) for name in shards.frozen}
    files.write(MODEL_FILE, shards.header | {"module": module})


class _FileWriter:
    """Writes files into a folder and records their digests. Raises ValueError for a file that cannot be written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: Entries = {}

    def write(self, name: str, value: Any) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(value, hashed := HashingFile(file))
                self.written[name] = hashed.finish(sync=False)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def _publish_folder(
    shards: ZeroShards, source: str, shares: list[tuple[dict[str, Any], Entries]], partial: Path, out: Path
) -> None:
    """Write the manifest and give the folder its final name."""
    counters = ("global_steps", "global_samples", "skipped_steps")
    manifest = {
        "format": UNIVERSAL_FORMAT,
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

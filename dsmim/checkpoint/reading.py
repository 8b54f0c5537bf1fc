"""Reads finished checkpoints: which of them are whole, and what they hold.

    RUN/checkpoints/step_00012500/   DeepSpeed's shards, state.json (what else the next step depends on),
                                     manifest.json (every file's size and SHA-256, written last)
    RUN/checkpoints/latest           the newest one's name, as DeepSpeed's own tools read it
    RUN/checkpoints/universal/       a converted checkpoint, see universal.py

The state is small: the order of samples and the learning rate are functions of the step, and the model's random stream
is seeded again from (seed, step, rank) at every step. saving.py writes checkpoints.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dsmim.engine.digest import sha256
from dsmim.engine.runtime import Runtime

MANIFEST = "manifest.json"
STATE = "state.json"
STATE_FORMAT = 1
UNIVERSAL_FOLDER = "universal"
_NAME = re.compile(r"step_(\d{8,})")


def find_valid(folder: Path, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files all match its manifest, and why newer ones were skipped.

    Collective: each rank checks its share of the files.
    """
    names = runtime.on_rank_zero(lambda: [path.name for path in candidates(folder)])
    skipped = []
    for name in names:
        faults = runtime.gather(check_files(folder / name, runtime.rank, runtime.world_size))
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return folder / name, skipped
        skipped.append(f"checkpoint {name} skipped: {fault}")
    return None, skipped


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises ValueError when the folder is no checkpoint or has another format."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: is not a checkpoint of dsmim ({error})") from None
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"{checkpoint}: written in format {state.get('format')}, this dsmim reads {STATE_FORMAT}")
    state.get("recipe", {}).get("data", {}).pop("allow_pipe", None)  # a file gives no permission to run commands
    return state


def candidates(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, newest first. Their files are not checked."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of completed steps from a checkpoint's name."""
    return int(checkpoint.name.split("_")[1])


def name_of(step: int) -> str:
    """Return the name of the checkpoint after so many completed steps."""
    return f"step_{step:08d}"


def set_aside(folder: Path, newer_than: int) -> None:
    """Rename checkpoints newer than a step to `….damaged`, so that none of them counts as the newest again."""
    for path in candidates(folder):
        if step_of(path) > newer_than:
            damaged = path.with_name(path.name + ".damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            path.rename(damaged)


def locate(path: Path) -> Path:
    """Return the checkpoint that a user's path means: the path itself, or the newest valid one of a run directory.

    Raises ValueError when there is none.
    """
    if (path / MANIFEST).is_file():
        if fault := check_files(path):
            raise ValueError(f"{path}: {fault}")
        return path
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    faults = []
    for checkpoint in candidates(folder):
        fault = check_files(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(f"{checkpoint.name}: {fault}")
    raise ValueError(f"{path}: holds no valid checkpoint" + "".join(f"\n  {fault}" for fault in faults))


def check_files(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return the first fault in a rank's share of the files (by default all files); None: they match the manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        checks = ((checkpoint / name, files[name]) for name in sorted(files)[rank::world_size])
        return next((fault for path, entry in checks if (fault := _fault(path, entry))), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read, or its manifest is damaged ({type(error).__name__}: {error})"


def _fault(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None if sha256(path) == entry["sha256"] else f"{path.name} is damaged (its digest differs)"

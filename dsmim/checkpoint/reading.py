"""Reads finished checkpoints: which of them are whole, and what they hold.

    RUN/checkpoints/step_00012500/   DeepSpeed's shards, state.json (what else the next step depends on),
                                     manifest.json (every file's size and SHA-256, written last)
    …/validation.json                the validation at its step, where it was measured after the checkpoint was saved
    RUN/checkpoints/latest           the newest one's name, as DeepSpeed's own tools read it
    RUN/checkpoints/universal/       a converted checkpoint, see universal.py

The state is small: the order of samples and the learning rate are functions of the step, and the model's random stream
is seeded again from (seed, step, rank) at every step. saving.py writes checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dsmim import strict_json
from dsmim.data.normalisation import as_stored
from dsmim.engine.digest import sha256
from dsmim.engine.runtime import Runtime

MANIFEST = "manifest.json"
STATE = "state.json"
VALIDATION = "validation.json"
STATE_FORMAT = 1
UNIVERSAL_FOLDER = "universal"
MAX_DAMAGED = 2  # folders ….damaged that a run keeps
_WAITS = (0.2, 1, 3)  # seconds before a file is read again that a network file system could not read
_Result = TypeVar("_Result")
_NAME = re.compile(r"step_(\d{8,})")


def find_valid(folder: Path, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files all match its manifest, and why newer ones were skipped.

    Collective: each rank checks its share of the files. Raises Stopped when a file cannot be read: that does not show
    that the checkpoint is damaged.
    """
    names = runtime.on_rank_zero(lambda: [path.name for path in candidates(folder)])
    skipped = []
    for name in names:
        with runtime.all_or_none():
            faults = runtime.gather(check_files(folder / name, runtime.rank, runtime.world_size))
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return folder / name, skipped
        skipped.append(f"checkpoint {name} skipped: {fault}")
    return None, skipped


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises ValueError when the folder is no checkpoint or has another format."""
    try:
        state = strict_json.loads(patiently((checkpoint / STATE).read_text))
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: is not a checkpoint of dsmim ({error})") from None
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"{checkpoint}: written in format {state.get('format')}, this dsmim reads {STATE_FORMAT}")
    if "recipe" not in state:
        return state
    recipe = as_stored(state["recipe"])
    recipe["data"].pop("allow_pipe", None)  # a file gives no permission to run commands
    return state | {"recipe": recipe}


def validation_of(checkpoint: Path) -> dict[str, float]:
    """Return the figures of the validation at a checkpoint's own step; {}: it was not validated, or is damaged.

    Raises OSError when a file cannot be read, see patiently.
    """
    found = [_values(checkpoint / STATE).get("validation"), _values(checkpoint / VALIDATION)]
    return found[0] or found[1]


def _values(path: Path) -> dict[str, Any]:
    try:
        values = strict_json.loads(patiently(path.read_text))
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


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


def set_aside(folder: Path, newer_than: int) -> list[str]:
    """Rename checkpoints newer than a step to `….damaged`, so that none of them counts as the newest again. Call it for
    those that find_valid has skipped.

    Keep the MAX_DAMAGED that were renamed last. Return what was renamed and removed, one line each.
    """
    said = []
    for path in reversed(candidates(folder)):
        if step_of(path) > newer_than:
            damaged = path.with_name(path.name + ".damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            path.rename(damaged)
            os.utime(damaged)  # when it was renamed
            said.append(f"{path.name} is now {damaged.name}")
    old = sorted(folder.glob("step_*.damaged"), key=lambda path: path.stat().st_mtime_ns, reverse=True)[MAX_DAMAGED:]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
        said.append(f"{path.name} is removed: the last {MAX_DAMAGED} damaged checkpoints are kept")
    return said


def locate(path: Path) -> Path:
    """Return the checkpoint that a user's path means: the path itself, or the newest valid one of a run directory.

    Raises ValueError when there is none, or when a file cannot be read.
    """
    if (path / MANIFEST).is_file():
        if fault := check_files(path):
            raise ValueError(f"{path}: {fault}")
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: {_no_folder(path)}; give a run directory, or one of its checkpoints")
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    faults = []
    for checkpoint in candidates(folder):
        fault = check_files(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(f"{checkpoint.name}: {fault}")
    raise ValueError(f"{path}: holds no valid checkpoint" + "".join(f"\n  {fault}" for fault in faults))


def _no_folder(path: Path) -> str:
    if not path.exists():
        return "no such file or directory"
    return "is a file, and a file of weights is not enough here (in Python dsmim.load reads what `dsmim export` wrote)"


def check_files(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return the first fault in a rank's share of the files (by default all files); None: they match the manifest.

    Raises ValueError when a file cannot be read, also after some seconds: it may be as it was written.
    """
    try:
        text = patiently((checkpoint / MANIFEST).read_text)
        files = json.loads(text)["files"]
        checks = [(checkpoint / name, files[name]["bytes"], files[name]["sha256"]) for name in sorted(files)]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        raise _unreadable(checkpoint, MANIFEST, error) from None
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest is damaged ({type(error).__name__}: {error})"
    return next((fault for check in checks[rank::world_size] if (fault := _fault(*check))), None)


def patiently(read: Callable[[], _Result]) -> _Result:
    """Return what `read` returns; try again a few times if it raises an OSError, as a network file system does when its
    server restarts (EIO, ESTALE). A file that does not exist is an answer at once."""
    for wait in _WAITS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait)
    return read()


def _fault(path: Path, size: int, digest: str) -> str | None:
    try:
        found = patiently(lambda: path.stat().st_size)
        if found != size:
            return f"{path.name} has {found} bytes instead of {size}"
        return None if patiently(lambda: sha256(path)) == digest else f"{path.name} is damaged (its digest differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise _unreadable(path.parent, path.name, error) from None


def _unreadable(checkpoint: Path, name: str, error: OSError) -> ValueError:
    return ValueError(
        f"{checkpoint}: {name} cannot be read ({error.strerror}; tried {len(_WAITS) + 1} times in {sum(_WAITS):g} s). "
        f"The checkpoint may be whole, so nothing was changed: start again when the file system answers, or rename "
        f"{checkpoint.name} to use the one before it"
    )

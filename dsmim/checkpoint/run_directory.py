"""The directory of one run: its lock, its recipe, and the checkpoint to resume from."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsmim.checkpoint import reading
from dsmim.checkpoint.failed_start import Before
from dsmim.checkpoint.recorded_paths import STARTED_IN, find_recipe_shards
from dsmim.data.normalisation import settled
from dsmim.engine.runtime import Runtime
from dsmim.models.foreign import PREFIX
from dsmim.recipe import Recipe
from dsmim.recipe.reading import differences

IDENTITY = {
    "data_fingerprint": "data.train: the shards are not those the run was started with",
    "decoder": "decoder: {old} → {new}: the same images have other pixels now, see docs/data.md",
    "repeats_order": "data.repeats: the repeats of a sample came {old} when the run was started, and are {new} in the "
    "global batch now; epochs are shorter too, see docs/data.md",
}
"""Keys of state.json that a resume compares besides the recipe, and what to say if one differs ({old} and {new} are its
values)."""

_OLDER_REPEATS = {"repeats_order": "in a row"}
"""What runs with data.repeats did before they recorded it. Other keys that a state lacks are not compared."""


@dataclass
class RunDirectory:
    """The directory of a run. `open` locks it and sets `resume_from` and `state` when there is a valid checkpoint; as a
    context manager it releases the lock at the end."""

    path: Path
    resume_from: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Messages for the user: skipped checkpoints, changes of a forked recipe."""
    changes: list[str] = field(default_factory=list)
    """What differs between the checkpoint's recipe and that of a fork, one line per key."""
    started_in: str = field(default_factory=lambda: str(Path.cwd()))
    """The folder where the run was started first, in which the recipe's relative paths are."""
    lock: TextIO | None = None
    _before: Before | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.lock is not None:
            if error is not None:
                self._before.restore()
            self.lock.close()

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.state.get("step", 0)

    @property
    def consumed(self) -> int:
        """Training samples consumed. The order of samples needs no other state."""
        return self.state.get("samples_consumed", 0)

    @property
    def saved(self) -> int | None:
        """The step of the checkpoint that the run resumes from."""
        return None if self.resume_from is None else self.step

    @property
    def validation_due(self) -> bool:
        """Whether the run was asked to stop while it validated at `step`."""
        return self.state.get("validation_due", False)

    def same_shards(self, world_size: int, stage: int) -> bool:
        """Return whether a job of this world size and ZeRO stage cuts the state into as many parts as the checkpoint's.

        At stage 0 every rank has the whole state, so any world size does.
        """
        return self.state["zero_stage"] == stage and (stage == 0 or self.state["world_size"] == world_size)

    def completed(self, recipe: Recipe) -> Recipe:
        """Return the recipe with what the run in this directory, if any, decides.

        That is the normalisation and optim.model_no_decay where the recipe leaves them out, and paths that lead to the
        shards, also when this start is made in another folder than the run's first; see find_shards in
        recorded_paths.py.
        """
        for checkpoint in reading.candidates(self.checkpoints):
            with suppress(ValueError, KeyError):  # open() says what is wrong with it
                state = reading.read_state(checkpoint)
                before = _of_older_run(Recipe.model_validate(state["recipe"]), state)
                return find_recipe_shards(settled(_of_older_run(recipe, state), before), state)
        return settled(recipe)

    def open(self, recipe: Recipe, identity: dict[str, str], runtime: Runtime, fork: bool) -> None:
        """Lock the directory and find the checkpoint to resume from. Collective.

        identity: see IDENTITY; fork: accept another recipe or other data than the run was started
        with. Raises Stopped when another live run holds the directory, when checkpoints exist but none is valid, and
        without fork when the recipe or the data differ.
        """
        with runtime.all_or_none():
            if runtime.is_rank_zero:
                self._before = Before.of(self.path)
                self.lock = _lock_directory(self.path)
            self.resume_from, self.notes = reading.find_valid(self.checkpoints, runtime)
            if self.resume_from is not None:
                self.state = runtime.on_rank_zero(lambda: reading.read_state(self.resume_from))
                self.started_in = self.state.get(STARTED_IN, self.started_in)
                self._compare(recipe, identity, fork)
            elif self.notes:
                raise _none_valid_error(self.path, self.notes)
            self.notes += runtime.on_rank_zero(lambda: reading.set_aside(self.checkpoints, newer_than=self.step))

    def write_recipe(self, recipe: Recipe) -> None:
        """Write RUN/recipe.yaml, for people to read: once the start has succeeded, so that one that fails changes
        nothing. On rank 0."""
        (self.path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    def _compare(self, recipe: Recipe, identity: dict[str, str], fork: bool) -> None:
        self.changes = changes_of(self.state, recipe, identity)
        if self.changes and not fork:
            raise changed_error(self.path, self.changes)
        self.notes += [f"forked: {change}" for change in self.changes]


def changes_of(state: dict[str, Any], recipe: Recipe, identity: dict[str, str]) -> list[str]:
    """Return the differences between a checkpoint's run and another recipe and identity (see IDENTITY), one line each.

    state: of the checkpoint. What it does not have, because an older dsmim wrote it, is as in
    _OLDER_REPEATS, or not compared.
    """
    before = _of_older_run(Recipe.model_validate(state["recipe"]), state)
    changes = differences(settled(before), settled(_of_older_run(recipe, state), before))
    recorded = identity | (_OLDER_REPEATS if before.data.repeats > 1 else {}) | state
    other = [key for key, value in identity.items() if recorded[key] != value]
    return changes + [IDENTITY[key].format(old=recorded[key], new=identity[key]) for key in other]


def _of_older_run(recipe: Recipe, state: dict[str, Any]) -> Recipe:
    """Return the recipe with the run's optim.model_no_decay, if it leaves the key out and the network is timm's.

    Runs from before the key existed decayed all matrices of such networks.
    """
    optim, stored = recipe.optim, state["recipe"]
    if "model_no_decay" in optim.model_fields_set or not stored["model"]["name"].startswith(PREFIX):
        return recipe
    value = stored["optim"].get("model_no_decay", False)
    return recipe.model_copy(update={"optim": optim.model_copy(update={"model_no_decay": value})})


def _lock_directory(path: Path) -> TextIO:
    """Lock RUN/lock until the file is closed. The kernel frees it when the process ends, also after a kill."""
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / "lock").open("a+")
    _acquire(lock, path)
    if not (path / "lock").exists() or not os.path.samestat(os.fstat(lock.fileno()), (path / "lock").stat()):
        lock.close()
        raise ValueError(f"{path}: another start has just failed and removed this directory; start again")
    os.register_at_fork(after_in_child=lock.close)  # else data workers would keep the lock after this process is killed
    lock.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    lock.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else ""))
    lock.flush()
    return lock


def _acquire(lock: TextIO, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(f"{path}: another live run holds this directory ({lock.read().strip()})") from None
    except OSError as error:
        raise ValueError(
            f"{path / 'lock'}: this file system supports no locks ({error.strerror}); mount it with locks (Lustre: "
            "-o flock) or put the run directory elsewhere"
        ) from None


def changed_error(path: Path, changes: list[str]) -> ValueError:
    """Return the error for a run whose recipe or data have changed; see changes_of."""
    listed = "".join(f"\n  {change}" for change in changes)
    return ValueError(
        f"{path}: the run was started with another recipe:{listed}\n"
        "Use another --run-dir, restore the recipe, or continue with the new one by --fork"
    )


def _none_valid_error(path: Path, faults: list[str]) -> ValueError:
    listed = "".join(f"\n  {fault}" for fault in faults)
    return ValueError(f"{path}: no checkpoint is valid:{listed}\nRestore the files, or remove {path} to start again")

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
from dsmim.data.decode import decoder_name
from dsmim.data.normalisation import settled
from dsmim.engine.runtime import Runtime
from dsmim.recipe import Recipe
from dsmim.recipe.reading import differences


@dataclass
class RunDirectory:
    """The directory of a run. `open` locks it and sets `resume_from` and `state` when there is a valid checkpoint; as a
    context manager it releases the lock at the end."""

    path: Path
    resume_from: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Messages for the user: skipped checkpoints, changes of a forked recipe."""
    lock: TextIO | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
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
        """Return whether a job of this world size and ZeRO stage can load the checkpoint as it is.

        At stage 0 every rank has the whole state, so any world size can.
        """
        return self.state["zero_stage"] == stage and (stage == 0 or self.state["world_size"] == world_size)

    def settled(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the normalisation that it leaves out: that of the run in this directory, if any."""
        for checkpoint in reading.candidates(self.checkpoints):
            with suppress(ValueError):  # open() says what is wrong with it
                return settled(recipe, Recipe.model_validate(reading.read_state(checkpoint)["recipe"]))
        return settled(recipe)

    def open(self, recipe: Recipe, data: str, runtime: Runtime, fork: bool) -> None:
        """Lock the directory and find the checkpoint to resume from. Collective.

        data: fingerprint of the training shards; fork: accept another recipe or other data than the run was started
        with. Raises Stopped when another live run holds the directory, when checkpoints exist but none is valid, and
        without fork when the recipe or the data differ.
        """
        with runtime.all_or_none():
            self.lock = _lock_directory(self.path) if runtime.is_rank_zero else None
            self.resume_from, self.notes = reading.find_valid(self.checkpoints, runtime)
            if self.resume_from is not None:
                self.state = runtime.on_rank_zero(lambda: reading.read_state(self.resume_from))
                self._compare(recipe, data, fork)
            elif self.notes:
                raise _none_valid_error(self.path, self.notes)
            runtime.on_rank_zero(lambda: reading.set_aside(self.checkpoints, newer_than=self.step))
            runtime.on_rank_zero(lambda: (self.path / "recipe.yaml").write_text(recipe.to_yaml()))

    def _compare(self, recipe: Recipe, data: str, fork: bool) -> None:
        changes = changes_of(self.state, recipe, data)
        if changes and not fork:
            raise changed_error(self.path, changes)
        self.notes += [f"forked: {change}" for change in changes]


def changes_of(state: dict[str, Any], recipe: Recipe, data: str) -> list[str]:
    """Return the differences between a checkpoint's run and another recipe and data, one line each.

    state: of the checkpoint; data: fingerprint of the training shards.
    """
    before = Recipe.model_validate(state["recipe"])
    changes = differences(settled(before), settled(recipe, before))
    if state.get("decoder", decoder_name()) != decoder_name():
        changes.append(
            f"decoder: {state['decoder']} → {decoder_name()}: the same images have other pixels now, see docs/data.md"
        )
    if state["data_fingerprint"] != data:
        changes.append("data.train: the shards are not those the run was started with")
    return changes


def _lock_directory(path: Path) -> TextIO:
    """Lock RUN/lock until the file is closed. The kernel frees it when the process ends, also after a kill."""
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / "lock").open("a+")
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
    os.register_at_fork(after_in_child=lock.close)  # else data workers would keep the lock after this process is killed
    lock.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    lock.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else ""))
    lock.flush()
    return lock


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

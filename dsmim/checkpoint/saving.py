"""Writes checkpoints to disk.

A checkpoint is written under another name, gets a manifest with the digest of every file, and is renamed to its final
name. Only then does `latest` name it.

With checkpoint.background a rank serialises into host memory and continues training while a thread writes. The
checkpoint is published at the first step boundary at which every rank has finished writing.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmim import strict_json
from dsmim.checkpoint.reading import (
    MANIFEST,
    STATE,
    STATE_FORMAT,
    UNIVERSAL_FOLDER,
    VALIDATION,
    candidates,
    name_of,
    step_of,
    validation_of,
)
from dsmim.engine.digest import file_entry
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine
from dsmim.health.outcome import Stopped
from dsmim.recipe import Checkpoint
from dsmim.recipe.running import Best


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    state: dict[str, Any]
    begun: float


class Saver:
    """Saves a run's checkpoints into `folder` and removes those that the recipe does not keep.

    keep_every: checkpoint.keep_every in steps, 0 for none; saved: the step of the newest checkpoint, None if there is
    none; say: where rank 0 reports.
    """

    def __init__(self, engine: Engine, folder: Path, settings: Checkpoint, keep_every: int, saved: int | None,
                 runtime: Runtime, say: Callable[[str], None]):  # fmt: skip
        self.engine, self.folder, self.runtime, self.say = engine, folder, runtime, say
        self.settings, self.keep_every, self.saved = settings, keep_every, saved
        self._pending: _Pending | None = None
        self._since = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and self.engine.writer.busy

    @property
    def due(self) -> bool:
        """Whether checkpoint.every.minutes have passed since the last save, or since this start: on rank 0 only, whose
        clock decides for all ranks."""
        minutes = self.settings.every.minutes
        return minutes is not None and self.runtime.is_rank_zero and time.monotonic() - self._since >= 60 * minutes

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step` completed steps. Collective. Raises Stopped when it cannot be written."""
        begun = time.monotonic()
        with self.runtime.long_timeout():
            self._begin(step, state, begun)
            if not self.settings.background:
                self.finish()
        self._since = time.monotonic()
        megabytes, stall = self.engine.writer.bytes / 1e6, self._since - begun
        self.say(f"checkpoint {name_of(step)}: {megabytes:.1f} MB of this rank, training stalled {stall:.2f} s")

    def is_best(self, figures: dict[str, float]) -> bool:
        """Return whether a validation is better than any before, so that checkpoint.keep_best needs its checkpoint.
        Collective."""
        wanted = self.settings.keep_best
        if wanted is None:
            return False
        return self.runtime.on_rank_zero(lambda: self._is_best(figures.get(wanted.metric), wanted))

    def _is_best(self, figure: float | None, wanted: Best) -> bool:
        pending = self._pending.state["validation"] if self._pending is not None else None
        try:
            earlier = [*map(validation_of, candidates(self.folder)), pending or {}]
        except OSError:
            return True  # one checkpoint too many is better than one too few
        others = [figures.get(wanted.metric) for figures in earlier]
        sign = _sign(wanted.mode)
        return _is_number(figure) and all(sign * figure < sign * other for other in others if _is_number(other))

    def add_validation(self, step: int, figures: dict[str, float]) -> None:
        """Record the validation of a finished checkpoint that was saved before it was measured. Collective."""
        self.runtime.on_rank_zero(lambda: self._add_validation(step, figures))

    def _add_validation(self, step: int, figures: dict[str, float]) -> None:
        _replace(self.folder / name_of(step) / VALIDATION, strict_json.dumps(figures) + "\n")
        self._remove_old()

    def _begin(self, step: int, state: dict[str, Any], begun: float) -> None:
        """Give this rank's files to the writer, after the checkpoint before is finished."""
        self.finish()
        partial = self.folder / f".partial_{step:08d}"
        try:
            self.runtime.on_rank_zero(lambda: fresh_folder(partial))
        except Stopped as error:
            raise _not_written(partial, error) from None
        self.engine.save_checkpoint(partial)
        self._pending = _Pending(step, partial, {"format": STATE_FORMAT, "step": step, **state}, begun)

    def finish(self) -> None:
        """Wait until the checkpoint in progress is written, and publish it. Collective.

        Raises Stopped when a rank could not write its files.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self.runtime.long_timeout():
            self._publish_when_written(pending)
            self.saved = pending.step
            self.runtime.on_rank_zero(self._clean_up)
        if self.settings.background:
            self.say(f"checkpoint {name_of(pending.step)}: on disk after {time.monotonic() - pending.begun:.1f} s")

    def _publish_when_written(self, pending: _Pending) -> None:
        try:
            with self.runtime.all_or_none():
                shares = self.runtime.gather(self.engine.writer.entries())
                files = {name: entry for share in shares for name, entry in share.items()}
                self.runtime.on_rank_zero(lambda: self._publish(pending, files))
        except Stopped as error:
            self.runtime.on_rank_zero(lambda: shutil.rmtree(pending.partial, ignore_errors=True))  # free the disk space
            raise _not_written(pending.partial, error) from None

    def _publish(self, pending: _Pending, files: dict[str, Any]) -> None:
        final = self.folder / name_of(pending.step)
        _write_text(pending.partial / STATE, strict_json.dumps(pending.state, indent=1) + "\n")
        files[STATE] = file_entry(pending.partial / STATE)
        _write_text(pending.partial / MANIFEST, strict_json.dumps({"files": files}, indent=1) + "\n")
        _fsync(pending.partial)
        if final.exists():  # a damaged one of the same step: a run would have resumed from a valid one
            shutil.rmtree(final)
        pending.partial.rename(final)
        _fsync(self.folder)
        _replace(self.folder / "latest", final.name)

    def _clean_up(self) -> None:
        """Remove the converted checkpoint, which is loaded by now, and those that the recipe does not keep."""
        shutil.rmtree(self.folder / UNIVERSAL_FOLDER, ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        found, wanted = candidates(self.folder), self.settings.keep_best
        try:
            best = best_of(found, wanted.metric, wanted.mode) if wanted is not None else None
        except OSError as error:
            self.say(f"old checkpoints are kept, because it cannot be seen which one is the best: {error}")
            return
        if best is not None:
            _replace(self.folder / "best", best.name)
        for old in found[self.settings.keep :]:
            if old != best and not (self.keep_every and step_of(old) % self.keep_every == 0):
                _remove(old)


def best_of(checkpoints: list[Path], metric: str, mode: str) -> Path | None:
    """Return the checkpoint with the best metric in the validation at its own step; the oldest of equal ones.

    checkpoints: newest first; mode: "min" or "max". Left out are checkpoints that are damaged, were not validated, or
    have a metric that is not finite. None: all are left out. Raises OSError when a file cannot be read.
    """
    figures = [(path, validation_of(path).get(metric)) for path in checkpoints]
    known = [(path, figure) for path, figure in figures if _is_number(figure)]
    return min(reversed(known), key=lambda pair: _sign(mode) * pair[1])[0] if known else None


def _is_number(figure: float | None) -> bool:
    return figure is not None and math.isfinite(figure)


def _sign(mode: str) -> int:
    return 1 if mode == "min" else -1


def _not_written(partial: Path, error: Stopped) -> Stopped:
    return Stopped(
        f"{partial}: the checkpoint cannot be written: {error}. The last one is still valid; free disk space or fix "
        "the disk, and start again"
    )


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first: if the removal is interrupted, no damaged checkpoint is left."""
    removed = checkpoint.with_name(f".removed_{checkpoint.name}")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)  # over NFS another process may still read it; the next save tries again


def fresh_folder(path: Path) -> None:
    """Create an empty folder, and remove those beside it that a killed run left half written or half removed."""
    for left in [*path.parent.glob(".partial_*"), *path.parent.glob(".removed_*")]:
        shutil.rmtree(left, ignore_errors=True)
    path.mkdir(parents=True)


def _replace(path: Path, text: str) -> None:
    """Write a small file, such as `latest`, in one atomic step."""
    _write_text(partial := path.with_name(f"{path.name}.partial"), text)
    partial.replace(path)
    _fsync(path.parent)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

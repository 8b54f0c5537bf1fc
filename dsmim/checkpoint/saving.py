"""Checkpoints to disk: written beside their final name, proven by a manifest, renamed; only then does `latest` move.

With checkpoint.background a rank serialises into host memory and trains on while a thread writes; the checkpoint is
published at the step boundary at which every rank has finished writing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmim.checkpoint.reading import FORMAT, MANIFEST, STATE, candidates, name_of, read_state, step_of
from dsmim.engine.digest import entry_of
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine
from dsmim.health.outcome import Stopped
from dsmim.recipe import Checkpoint

UNIVERSAL = "universal"
"""Folder of converted checkpoints, beside those that they were made of."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    state: dict[str, Any]
    begun: float


class Saver:
    """Saves a run's checkpoints into `folder` and keeps those that the recipe wants kept.

    keep_every: checkpoint.keep_every in steps, 0 for none; saved: the step of the newest one there is, if any;
    say: where rank 0 reports.
    """

    def __init__(self, engine: Engine, folder: Path, settings: Checkpoint, keep_every: int, saved: int | None,
                 runtime: Runtime, say: Callable[[str], None]):  # fmt: skip
        self.engine, self.folder, self.runtime, self.say = engine, folder, runtime, say
        self.settings, self.keep_every, self.saved = settings, keep_every, saved
        self._pending: _Pending | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._pending is not None and self.engine.writer.busy

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step` completed steps. Collective. Raises Stopped when a disk refuses."""
        begun = time.monotonic()
        with self.runtime.long_timeout():
            self._write(step, state, begun)
        megabytes, stall = self.engine.writer.bytes / 1e6, time.monotonic() - begun
        self.say(f"checkpoint {name_of(step)}: {megabytes:.1f} MB of this rank, training stalled {stall:.2f} s")

    def _write(self, step: int, state: dict[str, Any], begun: float) -> None:
        self.finish()
        partial = self.folder / f".partial_{step:08d}"
        try:
            self.runtime.on_rank_zero(lambda: fresh_folder(partial))
        except Stopped as error:
            raise _refused(partial, error) from None
        self.engine.save(partial)
        self._pending = _Pending(step, partial, {"format": FORMAT, "step": step, **state}, begun)
        if not self.settings.background:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and publish it. Collective. Raises Stopped when a disk refused."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self.runtime.long_timeout():
                self._settle(pending)

    def _settle(self, pending: _Pending) -> None:
        try:
            with self.runtime.all_or_none():
                shares = self.runtime.gather(self.engine.writer.entries())
                files = {name: entry for share in shares for name, entry in share.items()}
                self.runtime.on_rank_zero(lambda: self._publish(pending, files))
        except Stopped as error:
            self.runtime.on_rank_zero(lambda: shutil.rmtree(pending.partial, ignore_errors=True))  # make room
            raise _refused(pending.partial, error) from None
        self.saved = pending.step
        self.runtime.on_rank_zero(self._retain)
        if self.settings.background:
            self.say(f"checkpoint {name_of(pending.step)}: on disk after {time.monotonic() - pending.begun:.1f} s")

    def _publish(self, pending: _Pending, files: dict[str, Any]) -> None:
        final = self.folder / name_of(pending.step)
        _write_text(pending.partial / STATE, json.dumps(pending.state, indent=1) + "\n")
        files[STATE] = entry_of(pending.partial / STATE)
        _write_text(pending.partial / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
        _fsync(pending.partial)
        if final.exists():  # an older, damaged one of the same step: a valid one would have been resumed from
            shutil.rmtree(final)
        pending.partial.rename(final)
        _fsync(self.folder)
        _point(self.folder / "latest", final.name)

    def _retain(self) -> None:
        shutil.rmtree(self.folder / UNIVERSAL, ignore_errors=True)  # whoever needed it is beyond it
        found = candidates(self.folder)
        best = best_of(found, self.settings.keep_best.metric, self.settings.keep_best.mode) if self._choosy else None
        if best is not None:
            _point(self.folder / "best", best.name)
        for old in found[self.settings.keep :]:
            if old != best and not (self.keep_every and step_of(old) % self.keep_every == 0):
                _remove(old)

    @property
    def _choosy(self) -> bool:
        return self.settings.keep_best is not None


def best_of(checkpoints: list[Path], metric: str, mode: str) -> Path | None:
    """Of checkpoints, newest first, the one whose own validation has the best metric; of equals the oldest. None when
    none was validated. One that cannot be read, or whose metric is not finite, is no candidate."""
    figures = [(path, _figure(path, metric)) for path in checkpoints]
    known = [(path, figure) for path, figure in figures if figure is not None and math.isfinite(figure)]
    sign = 1 if mode == "min" else -1
    return min(reversed(known), key=lambda pair: sign * pair[1])[0] if known else None


def _figure(checkpoint: Path, metric: str) -> float | None:
    try:
        return (read_state(checkpoint).get("validation") or {}).get(metric)
    except ValueError:
        return None


def _refused(partial: Path, error: Stopped) -> Stopped:
    return Stopped(
        f"{partial}: the checkpoint cannot be written, and the last one stands: {error}. Make room or mend the "
        "disk, and start again"
    )


def _remove(checkpoint: Path) -> None:
    """Under another name first: a removal that is cut short must not leave a damaged checkpoint behind."""
    shutil.rmtree(going := checkpoint.with_name(f".removed_{checkpoint.name}"), ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going, ignore_errors=True)  # somebody may still read it over NFS; the next save tries again


def fresh_folder(path: Path) -> None:
    """An empty folder; what a killed session left half written or half removed goes."""
    for left in [*path.parent.glob(".partial_*"), *path.parent.glob(".removed_*")]:
        shutil.rmtree(left, ignore_errors=True)
    path.mkdir(parents=True)


def _point(pointer: Path, name: str) -> None:
    _write_text(partial := pointer.with_name(f"{pointer.name}.partial"), name)
    partial.replace(pointer)
    _fsync(pointer.parent)


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

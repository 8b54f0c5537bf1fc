"""Write metrics on rank 0: a console line, JSON lines, TensorBoard.

JSON has null where a figure is NaN or infinite (see strict_json.py); TensorBoard has the figure itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from dsmim import strict_json

NAMED = 10  # how many things of one kind a message names


class Log:
    """Writes RUN/metrics.jsonl, RUN/tensorboard and lines on standard error. If not `active`, it does nothing.

    step: completed steps that the run resumes from; validation_due: whether those still have to be validated. Lines of
    an interrupted session after that step are removed, so that metrics.jsonl of a resumed run has no step twice.
    """

    def __init__(
        self, folder: Path, active: bool, step: int, total: int, tensorboard: bool, validation_due: bool = False
    ):
        self.active, self.folder, self.total = active, folder, total
        self._board = None
        if not active:
            return
        self._file = _reopen(folder / "metrics.jsonl", step, validation_due)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def say(self, text: str) -> None:
        """Write a sentence to standard error."""
        if self.active:
            print(text, file=sys.stderr, flush=True)

    def step(self, step: int, values: dict[str, Any], seconds_per_step: float | None) -> None:
        """Log the figures of the training steps since the last line, with those of Clock.read, after `step` steps.

        seconds_per_step: of training, from which rank 0 says when it ends, without validations and savings to come.
        """
        self._write(step, values, "train")
        left = "unknown" if seconds_per_step is None else duration(seconds_per_step * (self.total - step))
        self.say(
            f"step {step}/{self.total} | loss {values['loss']:.4f} | lr {values['lr']:.2e} | "
            f"grad norm {values['grad_norm']:.3g} | {values['images_per_second']:.0f} images/s | "
            f"data wait {values['data_wait']:.0%} | ETA {left}"
        )

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Log the figures of a validation after `step` steps; metrics.jsonl names them val_…."""
        self._write(step, {f"val_{name}": value for name, value in values.items()}, "val")
        shown = " | ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "samples")
        self.say(f"step {step}/{self.total} | validation over {values['samples']} samples | {shown}")

    def host(self, step: int, values: dict[str, Any]) -> None:
        """Log the figures of the machines in a separate file, RUN/host.jsonl, because they differ between runs."""
        if self.active:
            path = self.folder / "host.jsonl"
            with _named(path), path.open("a") as file:
                file.write(strict_json.dumps({"step": step, **values}) + "\n")
            self._chart(step, values, "host")

    def sync(self) -> None:
        """Force metrics.jsonl to disk, so that no power loss keeps a checkpoint and loses the lines before it."""
        if self.active:
            with _named(self._file.name):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self.active:
            self._file.close()
        if self._board:
            self._board.close()

    def _write(self, step: int, values: dict[str, Any], group: str) -> None:
        if not self.active:
            return
        with _named(self._file.name):
            self._file.write(strict_json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self._chart(step, values, group)

    def _chart(self, step: int, values: dict[str, Any], group: str) -> None:
        for name, value in values.items() if self._board else ():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{group}/{name.removeprefix('val_')}", value, step)


class Clock:
    """Measures images per second, and the share of the time that this rank waits for data, since the last restart; and
    how long a step takes in the whole session."""

    def __init__(self) -> None:
        self._first_done, self._counted, self._seconds = False, 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self.begun = self._since = time.monotonic()
        self.waited, self.steps = 0.0, 0

    def stepped(self) -> None:
        """Count a step that has just ended."""
        now = time.monotonic()
        if self._first_done:
            self._seconds, self._counted = self._seconds + now - self._since, self._counted + 1
        self._first_done, self._since, self.steps = True, now, self.steps + 1

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over the session's steps, without the first, which may compile and starts the data workers, and
        without what happened before a restart, such as a validation; None: not known yet."""
        return self._seconds / self._counted if self._counted else None

    def waiting(self) -> Clock:
        """Count the time in a `with` block as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.waited += time.monotonic() - self._entered

    def read(self, global_batch: int) -> dict[str, float]:
        """Return images per second over all ranks, and this rank's share of waiting (0 to 1), since the restart."""
        elapsed = time.monotonic() - self.begun
        return {"images_per_second": global_batch * self.steps / elapsed, "data_wait": self.waited / elapsed}


def duration(seconds: float) -> str:
    """Return a time as '2h05m', '3m20s' or '7s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return '1 rank' or '2 ranks'. plural: given when it is not the noun with an s, as in 'micro batches'."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def some(items: Iterable[object], total: int, most: int = NAMED) -> str:
    """Return the first `most` of `total` items, and how many more there are."""
    named = ", ".join(str(item) for item in islice(items, most))
    return named if total <= most else f"{named} and {total - most} more"


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Add the path to the error of a write, which does not have it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); the last checkpoint is still valid") from None


def _reopen(path: Path, step: int, validation_due: bool):
    """Open metrics.jsonl for appending, without the lines after `step`, and without its validation if that is due."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _stays(line, step, validation_due)]
        temporary = path.with_suffix(".partial")
        with temporary.open("w") as file:
            file.write("".join(line + "\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())  # or a power loss could empty the file, while the checkpoints stay
        temporary.replace(path)
    return path.open("a")


def _stays(line: str, step: int, validation_due: bool) -> bool:
    """Return whether a line belongs to the steps up to `step`."""
    try:
        values = json.loads(line)
        return values["step"] < step or (values["step"] == step and not (validation_due and "val_samples" in values))
    except (ValueError, KeyError):
        return False  # a kill cut the line short

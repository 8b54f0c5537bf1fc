"""Metrics out, on rank 0: a console line, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Log:
    """Writes RUN/metrics.jsonl, RUN/tensorboard and a line to standard error. On other ranks it does nothing.

    step: completed steps that the run goes on from; validation_due: whether those are still to be validated. What an
    interrupted session logged beyond is taken back, so that the stream of a resumed run has no step twice.
    """

    def __init__(
        self, folder: Path, active: bool, step: int, total: int, tensorboard: bool, validation_due: bool = False
    ):
        self.active, self.folder, self.total = active, folder, total
        self._clock, self._first = time.monotonic(), step
        self._board = None
        if not active:
            return
        self._file = _reopen(folder / "metrics.jsonl", step, validation_due)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def say(self, text: str) -> None:
        """A sentence to the console."""
        if self.active:
            print(text, file=sys.stderr, flush=True)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """The figures of the training step that completed `step` steps: images_per_second and data_wait too."""
        self._write(step, values, "train")
        self.say(
            f"step {step}/{self.total} | loss {values['loss']:.4f} | lr {values['lr']:.2e} | "
            f"grad norm {values['grad_norm']:.3g} | {values['images_per_second']:.0f} images/s | "
            f"data wait {values['data_wait']:.0%} | ETA {self._eta(step)}"
        )

    def validation(self, step: int, values: dict[str, float]) -> None:
        self._write(step, {f"val_{name}": value for name, value in values.items()}, "val")
        shown = " | ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "samples")
        self.say(f"step {step}/{self.total} | validation over {values['samples']} samples | {shown}")

    def host(self, step: int, values: dict[str, Any]) -> None:
        """Figures of the machines, which no two runs share: into a stream of their own, RUN/host.jsonl."""
        if self.active:
            path = self.folder / "host.jsonl"
            with _named(path), path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self._chart(step, values, "host")

    def sync(self) -> None:
        """Bring the stream to disk: a checkpoint must not outlive the lines before it."""
        if self.active:
            with _named(self._file.name):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self.active:
            self._file.close()
        if self._board:
            self._board.close()

    def _write(self, step: int, values: dict[str, Any], group: str) -> None:
        if not self.active:
            return
        with _named(self._file.name):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self._chart(step, values, group)

    def _chart(self, step: int, values: dict[str, Any], group: str) -> None:
        for name, value in values.items() if self._board else ():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{group}/{name.removeprefix('val_')}", value, step)

    def _eta(self, step: int) -> str:
        per_step = (time.monotonic() - self._clock) / max(1, step - self._first)
        return duration(per_step * (self.total - step))


class Clock:
    """Images per second and the share of time spent waiting for data, since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.begun, self.waited, self.steps = time.monotonic(), 0.0, 0

    def waiting(self) -> Clock:
        return self

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.waited += time.monotonic() - self._entered

    def read(self, global_batch: int) -> dict[str, float]:
        """Images per second of all ranks, and this rank's share of waiting, for the steps since the restart."""
        elapsed = time.monotonic() - self.begun
        return {"images_per_second": global_batch * self.steps / elapsed, "data_wait": self.waited / elapsed}


def duration(seconds: float) -> str:
    """'2h05m', '3m20s', '7s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """A disk's refusal, with the path, which the error of a write does not have."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); the last checkpoint stands") from None


def _reopen(path: Path, step: int, validation_due: bool):
    """The stream opened for appending, without the lines beyond `step`; without its validation when that is due."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _stays(line, step, validation_due)]
        temporary = path.with_suffix(".partial")
        with temporary.open("w") as file:
            file.write("".join(line + "\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())  # or a power loss could empty the stream of a run whose checkpoints stand
        temporary.replace(path)
    return path.open("a")


def _stays(line: str, step: int, validation_due: bool) -> bool:
    try:
        values = json.loads(line)
        return values["step"] < step or (values["step"] == step and not (validation_due and "val_samples" in values))
    except (ValueError, KeyError):
        return False  # the line that a kill cut short

"""How a rank's files of a checkpoint reach the disk: DeepSpeed hands them over, one after the other.

Imports DeepSpeed: only after the process group's start.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from dsmim.engine.digest import Entry, Hashed


class Writer(CheckpointEngine):
    """Writes files with their digests; in the background, serialises them into memory first.

    A disk that refuses does not raise while DeepSpeed's other ranks wait in its barriers, but in `entries`.
    """

    def __init__(self, background: bool):
        super().__init__()
        self.name = "dsmim"
        self.background = background
        self.bytes = 0
        """Of the files handed over since the last `create`."""
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._files: dict[str, Future[Entry]] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self._files, self.bytes = {}, 0

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        file = Path(path)
        if optimizer := state_dict.get("optimizer_state_dict"):
            # An enum, which Python 3.11.2 pickles as a call of getattr, and torch's restricted loader refuses that.
            optimizer["zero_stage"] = int(optimizer["zero_stage"])
        if self._pool is None:
            self._files[file.name] = done = Future()
            _settle(done, lambda: _write(file, state_dict))
            self.bytes += 0 if done.exception() else done.result()["bytes"]
            return
        memory = _Memory()
        torch.save(state_dict, memory)
        self.bytes += sum(map(len, memory.pieces))
        self._files[file.name] = self._pool.submit(_drain, file, memory)

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)  # DeepSpeed pickles its own classes

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True  # dsmim publishes, when every rank's files are on disk

    @property
    def busy(self) -> bool:
        """Whether files are still being written."""
        return not all(future.done() for future in self._files.values())

    def entries(self) -> dict[str, Entry]:
        """Name → entry of every file, waiting for the last. Raises OSError for what could not be written."""
        return {name: future.result() for name, future in self._files.items()}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class _Memory:
    """What was written, in pieces: one copy, no growing buffer."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))  # torch's view of a tensor is gone when this returns
        return len(data)

    def flush(self) -> None:
        pass


def _write(path: Path, state: Any) -> Entry:
    with path.open("wb") as file:
        hashed = Hashed(file)
        torch.save(state, hashed)
        return hashed.end()


def _drain(path: Path, memory: _Memory) -> Entry:
    with path.open("wb") as file:
        hashed = Hashed(file)
        while memory.pieces:
            hashed.write(memory.pieces.pop(0))  # freed as it goes
        return hashed.end()


def _settle(future: Future, action: Any) -> None:
    try:
        future.set_result(action())
    except OSError as error:
        future.set_exception(error)

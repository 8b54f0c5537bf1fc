"""Writes a rank's files of a checkpoint, which DeepSpeed passes on one after the other.

Imports DeepSpeed: import it only after the process group was started.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from dsmim.engine.digest import FileEntry, HashingFile


class CheckpointWriter(CheckpointEngine):
    """Writes files and computes their digests; in the background, serialises them into memory first.

    A file that cannot be written raises in `entries`, not in `save`, where other ranks wait in DeepSpeed's barriers.
    """

    def __init__(self, background: bool):
        super().__init__()
        self.name = "dsmim"
        self.background = background
        self.bytes = 0
        """Size of the files that were passed since the last `create`."""
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._files: dict[str, Future[FileEntry]] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a new checkpoint: forget the files of the one before."""
        self._files, self.bytes = {}, 0

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file, or copy it into memory and let the thread write it. See `entries` for its errors."""
        file = Path(path)
        if optimizer := state_dict.get("optimizer_state_dict"):
            # It is an enum. Python 3.11.2 pickles that as a call of getattr, which torch's restricted loader refuses.
            optimizer["zero_stage"] = int(optimizer["zero_stage"])
        if self._pool is None:
            self._files[file.name] = done = Future()
            _set_result(done, lambda: _write(file, state_dict))
            self.bytes += 0 if done.exception() else done.result()["bytes"]
            return
        memory = _MemoryFile()
        torch.save(state_dict, memory)
        self.bytes += sum(map(len, memory.pieces))
        self._files[file.name] = self._pool.submit(_write_from_memory, file, memory)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what a file holds. It is unpickled without restrictions, so it must be the user's own."""
        return torch.load(path, map_location=map_location, weights_only=False)  # DeepSpeed pickles its own classes

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return True, which DeepSpeed expects after the last file."""
        return True  # Saver publishes the checkpoint, once every rank's files are on disk

    @property
    def busy(self) -> bool:
        """Whether files are still being written."""
        return not all(future.done() for future in self._files.values())

    def entries(self) -> dict[str, FileEntry]:
        """Wait for the last file and return name → entry. Raises OSError for a file that could not be written."""
        return {name: future.result() for name, future in self._files.items()}

    def close(self) -> None:
        """Wait for the files that are still being written, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()


class _MemoryFile:
    """Keeps what is written to it as a list of pieces: one copy, and no buffer that grows."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))  # a copy: torch's view of a tensor ends when this returns
        return len(data)

    def flush(self) -> None:
        pass


def _write(path: Path, state: Any) -> FileEntry:
    with path.open("wb") as file:
        hashed = HashingFile(file)
        torch.save(state, hashed)
        return hashed.finish()


def _write_from_memory(path: Path, memory: _MemoryFile) -> FileEntry:
    with path.open("wb") as file:
        hashed = HashingFile(file)
        while memory.pieces:
            hashed.write(memory.pieces.pop(0))  # frees each piece once it is written
        return hashed.finish()


def _set_result(future: Future, action: Any) -> None:
    try:
        future.set_result(action())
    except OSError as error:
        future.set_exception(error)

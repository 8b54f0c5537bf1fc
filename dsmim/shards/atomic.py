"""Files that are there whole or not at all, and the removal of what a killed process has left.

Every file of shards is first written beside its final name, as `.NAME.XXXXXXXX.dsmim-partial`, and then renamed. The
writer holds the lock of the partial file, and the kernel drops it when the writer ends, however it ends. So a partial
file whose lock is free is a leftover. (A process number in the name would not say so: numbers are used again, and
every node of a shared file system has its own.) Where a file system has no locks, leftovers stay.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dsmim.shards.locks import locked

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.dsmim-partial", re.DOTALL)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears under its name whole or not at all; create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(path) as partial:
        partial.write_bytes(data)
        partial.replace(path)


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Create an empty file in the folder of `path`, which the caller fills and renames to `path`.

    Unless it was renamed, it is removed at the end.
    """
    with ExitStack() as stack:
        partial = _create(path, stack)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files in a folder whose writers have ended. Each command that writes calls it once."""
    for name in os.listdir(folder) if folder.is_dir() else []:  # noqa: PTH208 - names only: there may be a million
        if _PARTIAL.fullmatch(name):
            with suppress(OSError):  # another user's file, or a file system without locks
                remove_if_free(folder / name, folder / name)


def remove_if_free(partial: Path, lock: Path) -> None:
    """Remove a partial file unless a living process holds the lock that its writer holds."""
    with locked(lock, wait=False) as free:
        if free:
            partial.unlink(missing_ok=True)


def _create(path: Path, stack: ExitStack) -> Path:
    """Create the partial file, locked until the stack closes."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.dsmim-partial")
        try:
            stack.enter_context(locked(partial))
        except OSError:
            if not partial.exists():
                raise
            return partial  # its file system has no locks
        if partial.exists():  # else another process removed it before it was locked
            return partial

"""Files that are there whole or not at all, and the removal of what a killed process has left.

Every file of shards is first written beside its final name, as `.NAME.XXXXXXXX.dsmim-partial`, and then renamed. The
first four of the eight hexadecimal digits are a hash of the host's name, the others are random. The writer holds the
lock of the partial file, and the kernel drops it when the writer ends, however it ends. So a partial file of this host
whose lock is free is a leftover. (A process number in the name would not say so: numbers are used again.) Another
host's lock may look free although it is held, so its file is a leftover only when it is old too. Where a file system
has no locks, leftovers stay.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dsmim.shards.locks import locked

_PARTIAL = re.compile(r"\..+\.([0-9a-f]{4})[0-9a-f]{4}\.dsmim-partial", re.DOTALL)

# Seconds without a change after which another host's partial file may be a leftover. On a file system whose locks are
# local to a node (Lustre: -o localflock, NFS: local_lock=flock) its lock looks free here. A living writer changes its
# file within minutes; a day is also far more than the clocks of two hosts differ by.
_OLD = 24 * 3600


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
    host = _host()
    for name in os.listdir(folder) if folder.is_dir() else []:  # noqa: PTH208 - names only: there may be a million
        if match := _PARTIAL.fullmatch(name):
            with suppress(OSError):  # another user's file, a link, or a file system without locks
                _remove_if_free(folder / name, 0 if match[1] == host else _OLD)


def _remove_if_free(partial: Path, age: float) -> None:
    """Remove a partial file whose lock is free, if `age` is 0 or the file was not changed for `age` seconds."""
    with locked(partial, wait=False, create=False) as free:
        if free and (not age or time.time() - partial.lstat().st_mtime > age):
            partial.unlink(missing_ok=True)


def _host() -> str:
    """Return four hexadecimal digits for this host. Eight in all: a longer name could pass the limit of 255 bytes."""
    return hashlib.sha256(os.fsencode(socket.gethostname())).hexdigest()[:4]


def _create(path: Path, stack: ExitStack) -> Path:
    """Create the partial file, locked until the stack closes."""
    while True:
        partial = path.with_name(f".{path.name}.{_host()}{secrets.token_hex(2)}.dsmim-partial")
        with suppress(FileExistsError):  # another writer's file, a leftover or a link has this name: try another
            partial.touch(exist_ok=False)
            with suppress(OSError):  # its file system has no locks
                stack.enter_context(locked(partial, create=False))
            if partial.exists():  # else another process removed it before it was locked
                return partial

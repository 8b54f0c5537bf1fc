"""Locks between processes: a file that one process at a time holds by flock (2).

The kernel drops the lock when the process ends, however it ends. Nodes that share a file system see each other's locks
where it has them (NFS; Lustre mounted with -o flock).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Locks held by this process. A forked child would keep them locked after the death of this process.
_held: set[int] = set()


def _drop_held() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_held)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is created if it is missing.

    Yields whether the lock is held: always with `wait`; without, False while another process holds it. Raises OSError
    when the file cannot be opened for writing, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        held = _flock(descriptor, path, wait)
        try:
            yield held
        finally:
            if held:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it open too
    finally:
        _held.discard(descriptor)  # before it is closed, because its number is then given to another file
        os.close(descriptor)


def _flock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        advice = "mount it with them (Lustre: -o flock), or use another folder"
        raise OSError(error.errno, f"its file system has no locks ({error.strerror}); {advice}", str(path)) from None
    return True

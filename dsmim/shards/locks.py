"""Locks between processes: a file that one process at a time holds by flock (2).

The kernel drops the lock when the process ends, however it ends. Nodes that share a file system see each other's locks
where it has them (NFS; Lustre mounted with -o flock).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What flock reports on a file system without locks."""

# Locks held by this process. A forked child would keep them locked after the death of this process.
_held: set[int] = set()


def _drop_held() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_held)


@contextmanager
def locked(path: Path, wait: bool = True, create: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is created if it is missing, unless `create` is False.

    Yields whether the lock is held: always with `wait`; without, False while another process holds it. Raises OSError
    when the file cannot be opened for writing, is a symbolic link, or cannot be locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o666)
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
        reason = error.strerror
        if error.errno in _NO_LOCKS:
            advice = "mount it with them (Lustre: -o flock), or use another folder"
            reason = f"its file system has no locks ({reason}); {advice}"
        raise OSError(error.errno, reason, str(path)) from None
    return True

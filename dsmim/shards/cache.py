"""Whole remote shards on the node's own disk: bounded, verified, one download for all processes of the node.

The folder holds, for a shard with SHA-256 DIGEST: DIGEST.tar, a whole and verified shard, which appears by a rename;
DIGEST.SIZE.part, a download under way, whose name says how much room it will take; and DIGEST.lock, held by flock
while one process downloads. The kernel drops the lock of a killed process; its part is swept by the next download.
Lock files stay: a lock that is unlinked could be held twice. bound.lock orders those who make room.

Use counts by modification time. The bound should hold two shuffle windows at least, the one being read and the one
being fetched; a smaller one evicts shards that are still needed, which costs downloads and nothing else. An evicted
shard takes disk until the last process closes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dsmim.shards import remote
from dsmim.shards.atomic import remove_if_free
from dsmim.shards.locks import locked

Shard = tuple[str, int, str]  # URL, bytes, SHA-256
_WHOLE = re.compile(r"[0-9a-f]{64}\.tar")  # nothing else in the folder is ever evicted,
_PART = re.compile(r"[0-9a-f]{64}\.(\d+)\.part")  # or swept
_POLL = 0.1  # seconds between looks whether there is room now


class ShardCache:
    """At most max_bytes of shards in a folder of a local disk. Travels between processes, forked or pickled."""

    def __init__(self, folder: Path, max_bytes: int, attempts: int = 5, first_wait: float = 1.0, timeout: float = 60.0):
        """Creates the folder. attempts, first_wait and timeout (seconds) are remote.download's. Raises ValueError when
        the folder cannot be created."""
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._retries = {"attempts": attempts, "first_wait": first_wait, "timeout": timeout}
        self._prefetcher: _Prefetcher | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be created ({error.strerror}); set data.cache_dir") from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_prefetcher": None}  # a thread does not travel

    def open(self, url: str, size: int, sha256: str) -> int:
        """A read-only descriptor of the whole shard, downloaded when it is not here; the caller closes it. It stays
        readable when another process evicts the shard.

        Raises ValueError when the shard cannot be read, is not the one that was indexed, or finds no room.
        """
        try:
            if (descriptor := self._whole(size, sha256)) is not None:
                return descriptor
            with locked(self.folder / f"{sha256}.lock"):
                descriptor = self._whole(size, sha256)  # another process may have been at it
                return self._fetch(url, size, sha256) if descriptor is None else descriptor
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot hold {url} ({error.strerror}); free space there, lower data.cache_gb, or set "
                "data.cache_dir to another disk"
            ) from error

    def prefetch(self, shards: list[Shard]) -> None:
        """Download what is missing of these shards, in this order, in the background; what was still pending of an
        earlier list is forgotten. Shards that another process downloads just now are left to it, none of the list is
        evicted for another of it, and failures are silent: `open` will report them."""
        for _, _, sha256 in shards:
            with suppress(OSError):
                os.utime(self.folder / f"{sha256}.tar")
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():  # a thread does not survive a fork
            self._prefetcher = _Prefetcher(self)
        self._prefetcher.replace(shards)

    def fetch_if_free(self, url: str, size: int, sha256: str, keep: Collection[str]) -> None:
        """Download one shard, unless it is here, another process is at it, or a digest of `keep` would have to go."""
        with locked(self.folder / f"{sha256}.lock", wait=False) as held:
            if held and not (self.folder / f"{sha256}.tar").exists():
                descriptor = self._fetch(url, size, sha256, keep)
                if descriptor is not None:
                    os.close(descriptor)

    def _whole(self, size: int, sha256: str) -> int | None:
        try:
            descriptor = os.open(self.folder / f"{sha256}.tar", os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != size:  # somebody wrote into it, or the index tells something else
            os.close(descriptor)
            return None
        with suppress(OSError):  # another user's file: it counts as old as it is
            os.utime(descriptor)
        return descriptor

    def _fetch(self, url: str, size: int, sha256: str, keep: Collection[str] | None = None) -> int | None:
        """Download under the shard's lock. With keep, None where there is no room; without, waits for downloads of
        others to end, which need nothing of ours and can then be evicted."""
        if size > self.max_bytes:
            raise ValueError(
                f"{url}: has {size} bytes, and the cache may hold {self.max_bytes}; raise data.cache_gb, or cut the "
                "data into smaller shards"
            )
        part = self.folder / f"{sha256}.{size}.part"
        while not self._reserve(part, size, keep or ()):
            if keep is not None:
                return None
            time.sleep(_POLL)
        try:
            return self._download(url, part, size, sha256)
        finally:
            part.unlink(missing_ok=True)

    def _download(self, url: str, part: Path, size: int, sha256: str) -> int:
        for _ in range(2):  # a proxy may have kept an old copy, a disk may have flipped a bit: once afresh
            with part.open("w+b") as file:
                remote.download(url, file, **self._retries)
                found = file.seek(0, os.SEEK_END)
                file.seek(0)
                if found == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    os.fsync(file.fileno())
                    descriptor = os.open(part, os.O_RDONLY)  # before others can see, and evict, it
                    part.rename(self.folder / f"{sha256}.tar")
                    return descriptor
        difference = f"{found} bytes instead of {size}" if found != size else "another SHA-256"
        raise ValueError(
            f"{url}: contents differ from its index ({difference}); if the shard was replaced on purpose, "
            f"run: dsmim shards index --force {shlex.quote(url)} --index-dir DIR"
        )

    def _reserve(self, part: Path, size: int, keep: Collection[str]) -> bool:
        """Make room and take it, so that no two processes count on the same bytes."""
        with locked(self.folder / "bound.lock"):
            self._sweep(part.name.partition(".")[0])
            if not self._make_room(size, keep):
                return False
            part.touch()
            return True

    def _sweep(self, own: str) -> None:
        """Remove the parts of killed processes: those of our own shard, and those whose lock is free."""
        for part in self._parts():
            digest = part.name.partition(".")[0]
            if digest == own:
                part.unlink(missing_ok=True)
            else:
                remove_if_free(part, self.folder / f"{digest}.lock")

    def _parts(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _PART.fullmatch(path.name)]

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        """Evict the shards that nobody used for longest, until the bound and the disk have room for `size` bytes."""
        used = sum(int(_PART.fullmatch(part.name)[1]) for part in self._parts())
        # Parts first: one that becomes a whole shard meanwhile is counted twice, and not overlooked.
        shards = [(path.stat(), path) for path in self.folder.iterdir() if _WHOLE.fullmatch(path.name)]
        used += sum(stat.st_size for stat, _ in shards)
        for stat, path in sorted(shards, key=lambda shard: shard[0].st_mtime_ns):
            if used + size <= self.max_bytes and shutil.disk_usage(self.folder).free >= size:
                break
            if path.stem not in keep:
                path.unlink()
                used -= stat.st_size
        if shutil.disk_usage(self.folder).free < size:
            raise OSError(errno.ENOSPC, f"its disk has not the {size} bytes free that the shard needs")
        return used + size <= self.max_bytes


class _Prefetcher:
    """The thread of one process that downloads a list. It is a daemon: the end of the program does not wait for it,
    and what it leaves undone is a part."""

    def __init__(self, cache: ShardCache):
        self.pid = os.getpid()
        self._cache = cache
        self._shards: list[Shard] = []
        self._new = threading.Event()
        threading.Thread(target=self._run, name="shard prefetch", daemon=True).start()

    def replace(self, shards: list[Shard]) -> None:
        self._shards = list(shards)
        self._new.set()

    def _run(self) -> None:
        while self._new.wait():
            self._new.clear()
            shards = self._shards
            keep = {sha256 for _, _, sha256 in shards}
            for shard in shards:
                if self._shards is not shards:
                    break
                with suppress(Exception):  # whoever needs the shard meets the same error in `open`, which tells it
                    self._cache.fetch_if_free(*shard, keep)

"""A cache of remote shards on the node's own disk: bounded, verified, one download for all processes of the node.

For a shard with SHA-256 DIGEST the folder holds up to three files. DIGEST.tar is the whole, verified shard; it appears
by a rename. DIGEST.SIZE.part is a download in progress; its name says how many bytes it will take. DIGEST.lock is
locked while one process downloads; the next download removes the part of a killed process, whose lock is free. Lock
files are not removed, because two processes could then hold one lock. bound.lock is held while space is freed.

The modification time of DIGEST.tar is the time of its last use. The bound should hold at least two shuffle windows, the
one being read and the one being downloaded. A smaller bound evicts shards that are still needed, which costs only more
downloads. An evicted shard takes disk space until the last process closes it.
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
from dsmim.shards.locks import locked

Shard = tuple[str, int, str]  # URL, bytes, SHA-256
_WHOLE = re.compile(r"[0-9a-f]{64}\.tar")  # only such files are evicted
_PART = re.compile(r"[0-9a-f]{64}\.(\d+)\.part")  # only such files are removed as leftovers
_POLL = 0.1  # seconds between two attempts to reserve space


class ShardCache:
    """At most max_bytes of shards in a folder of a local disk. It may be forked or pickled into other processes."""

    def __init__(self, folder: Path, max_bytes: int, attempts: int = 5, first_wait: float = 1.0, timeout: float = 60.0):
        """Create the folder. attempts, first_wait and timeout (seconds) are passed to remote.download. Raises
        ValueError when the folder cannot be created."""
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._retries = {"attempts": attempts, "first_wait": first_wait, "timeout": timeout}
        self._prefetcher: _Prefetcher | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be created ({error.strerror}); set data.cache_dir") from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_prefetcher": None}  # a thread cannot be pickled

    def open(self, url: str, size: int, sha256: str) -> int:
        """Return a read-only descriptor of the whole shard, after downloading it if necessary; the caller closes it.
        It stays readable when another process evicts the shard.

        Raises ValueError when the shard cannot be read, differs from its index, or does not fit.
        """
        try:
            if (descriptor := self._whole(size, sha256)) is not None:
                return descriptor
            with locked(self.folder / f"{sha256}.lock"):
                descriptor = self._whole(size, sha256)  # another process may just have downloaded it
                return self._fetch(url, size, sha256) if descriptor is None else descriptor
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot hold {url} ({error.strerror}); free space there, lower data.cache_gb, or set "
                "data.cache_dir to another disk"
            ) from error

    def prefetch(self, shards: list[Shard]) -> None:
        """Download the missing ones of these shards in the background, in this order. What is still pending of an
        earlier list is dropped. Shards that another process is downloading are left to it, no shard of the list is
        evicted for another one of it, and failures are silent: `open` will report them."""
        for _, _, sha256 in shards:
            with suppress(OSError):
                os.utime(self.folder / f"{sha256}.tar")
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():  # a thread does not survive a fork
            self._prefetcher = _Prefetcher(self)
        self._prefetcher.replace(shards)

    def fetch_if_free(self, url: str, size: int, sha256: str, keep: Collection[str]) -> None:
        """Download one shard, unless it is in the cache, another process is downloading it, or a shard whose digest is
        in `keep` would have to be evicted."""
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
        if os.fstat(descriptor).st_size != size:  # it was written to, or the index says otherwise
            os.close(descriptor)
            return None
        with suppress(OSError):  # another user's file: its time cannot be set
            os.utime(descriptor)
        return descriptor

    def _fetch(self, url: str, size: int, sha256: str, keep: Collection[str] | None = None) -> int | None:
        """Download a shard whose lock the caller holds. When there is no space: with `keep`, return None; without, wait
        until downloads of other processes end, whose shards can then be evicted."""
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
        for _ in range(2):  # the second time if a proxy had an old copy or the disk flipped a bit
            with part.open("w+b") as file:
                remote.download(url, file, **self._retries)
                found = file.seek(0, os.SEEK_END)
                file.seek(0)
                if found == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    os.fsync(file.fileno())
                    descriptor = os.open(part, os.O_RDONLY)  # before other processes can see and evict it
                    part.rename(self.folder / f"{sha256}.tar")
                    return descriptor
        difference = f"{found} bytes instead of {size}" if found != size else "another SHA-256"
        raise ValueError(
            f"{url}: contents differ from its index ({difference}); if the shard was replaced on purpose, "
            f"run: dsmim shards index --force {shlex.quote(url)} --index-dir DIR"
        )

    def _reserve(self, part: Path, size: int, keep: Collection[str]) -> bool:
        """Free space and reserve it by an empty part; return whether it succeeded. No two processes count on the same
        bytes."""
        with locked(self.folder / "bound.lock"):
            self._remove_leftovers(part.name.partition(".")[0])
            if not self._free_space(size, keep):
                return False
            part.touch()
            return True

    def _remove_leftovers(self, own: str) -> None:
        """Remove the parts of killed processes: those whose lock is free, and those of digest `own`, whose lock this
        process holds."""
        for part in self._parts():
            digest = part.name.partition(".")[0]
            if digest == own:
                part.unlink(missing_ok=True)
            else:
                with locked(self.folder / f"{digest}.lock", wait=False) as free:
                    if free:
                        part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _PART.fullmatch(path.name)]

    def _free_space(self, size: int, keep: Collection[str]) -> bool:
        """Evict the least recently used shards until the bound and the disk have `size` bytes left; return whether the
        bound has them. Raises OSError when the disk has not."""
        used = sum(int(_PART.fullmatch(part.name)[1]) for part in self._parts())
        # Parts are listed first: one that becomes a whole shard in between is counted twice rather than not at all.
        shards = [(path.stat(), path) for path in self.folder.iterdir() if _WHOLE.fullmatch(path.name)]
        used += sum(stat.st_size for stat, _ in shards)
        for stat, path in sorted(shards, key=lambda shard: shard[0].st_mtime_ns):
            if used + size <= self.max_bytes and shutil.disk_usage(self.folder).free >= size:
                break
            if path.stem not in keep:
                path.unlink()
                used -= stat.st_size
        if shutil.disk_usage(self.folder).free < size:
            raise OSError(errno.ENOSPC, f"its disk does not have the {size} free bytes that the shard needs")
        return used + size <= self.max_bytes


class _Prefetcher:
    """The thread of one process that downloads a list of shards. It is a daemon: the program ends without waiting for
    it, and an unfinished download is left as a part."""

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
                with suppress(Exception):  # the process that needs the shard gets the same error from `open`
                    self._cache.fetch_if_free(*shard, keep)

"""Samples by shard and row: one positioned read each, a few shards open at a time."""

from __future__ import annotations

import os
import shlex
import tarfile
from collections import OrderedDict
from collections.abc import Iterable

from dsmim.data.cache import ShardCache
from dsmim.data.index import ShardIndex, Table
from dsmim.data.remote import is_remote
from dsmim.data.tar import parse_sample

OPEN_SHARDS = 32  # at least; a window of the order has to fit, and the one that begins while it ends


class DataError(ValueError):
    """A shard that cannot be trained on. Raised in a data worker, it reaches the user without the traceback that
    torch's DataLoader wraps around it."""

    def __init__(self, message: str):
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class ShardReader:
    """Local shards are read where they lie, remote ones through the cache."""

    def __init__(self, shards: list[ShardIndex], cache: ShardCache | None = None, keep: int = OPEN_SHARDS):
        self.shards, self.cache, self.keep = shards, cache, max(keep, OPEN_SHARDS)
        self._open: OrderedDict[int, tuple[int, Table]] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # neither descriptors nor mappings travel between processes

    def read(self, shard: int, row: int) -> tuple[str, dict[str, bytes]]:
        """Key and members (extension → bytes). Raises DataError when the shard is no longer what was indexed."""
        descriptor, table = self._opened(shard)
        offset, length = table.place(row)
        data, tar = os.pread(descriptor, length, offset), self.shards[shard].tar
        if len(data) < length:
            raise DataError(f"{tar}: has shrunk since it was opened; copy or build it again")
        try:
            key, members = parse_sample(data)
        except tarfile.TarError:
            key, members = "", {}  # the bytes there are no tar member any more
        if key != table.keys[row]:
            raise DataError(
                f"{tar}: has changed since it was indexed: at byte {offset} stands {key or 'no sample'!r} where "
                f"{table.keys[row]!r} should be; if that is on purpose, run: dsmim shards index --force {shlex.quote(tar)}"
            )
        return key, members

    def key(self, shard: int, row: int) -> str:
        """The key alone, from the index."""
        return self.shards[shard].table().keys[row]

    def expect(self, shards: Iterable[int]) -> None:
        """Remote shards that will be read soon, in this order: fetched in the background."""
        if self.cache:
            indexes = (self.shards[shard] for shard in shards)
            self.cache.prefetch([(i.tar, i.tar_bytes, i.sha256) for i in indexes if is_remote(i.tar)])

    def _opened(self, shard: int) -> tuple[int, Table]:
        if shard not in self._open:
            if len(self._open) >= self.keep:
                os.close(self._open.popitem(last=False)[1][0])
            table = self._table(self.shards[shard])
            self._open[shard] = self._descriptor(self.shards[shard]), table
        self._open.move_to_end(shard)
        return self._open[shard]

    def _table(self, index: ShardIndex) -> Table:
        try:
            return index.table()
        except ValueError as error:
            raise DataError(str(error)) from None

    def _descriptor(self, index: ShardIndex) -> int:
        if is_remote(index.tar):
            if not self.cache:
                raise DataError(f"{index.tar}: remote shards need a folder on the node: data.cache_dir=DIR")
            try:
                return self.cache.open(index.tar, index.tar_bytes, index.sha256)
            except ValueError as error:
                raise DataError(str(error)) from None
        try:
            descriptor = os.open(index.tar, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{index.tar}: cannot be opened: {error.strerror}") from None
        if (size := os.fstat(descriptor).st_size) != index.tar_bytes:
            os.close(descriptor)
            raise DataError(f"{index.tar}: has {size} bytes where {index.tar_bytes} were indexed: it has changed")
        return descriptor

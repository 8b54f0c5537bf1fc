"""Reads samples by shard and row: one read at an offset per sample, with a few shards open at a time."""

from __future__ import annotations

import os
import resource
import tarfile
from collections import OrderedDict
from collections.abc import Iterable

from dsmim.recipe.data import MAX_PIXELS
from dsmim.shards.cache import ShardCache
from dsmim.shards.index import ShardIndex
from dsmim.shards.remote import is_remote
from dsmim.shards.sample_format import SampleFormat
from dsmim.shards.table import Table
from dsmim.shards.tar import Link, linked_bytes, parse_sample

OPEN_SHARDS = 32  # at least: two windows of the order have to fit, the one that ends and the one that begins


class DataError(ValueError):
    """A shard cannot be used for training. When a data worker raises it, the user sees it without the traceback that
    torch's DataLoader adds."""

    def __init__(self, message: str):
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class ShardReader:
    """Reads local shards in place, and remote ones through the cache.

    keep: number of shards whose descriptors and tables stay open, unless the process may not have so many. image_key:
    extension of the images; None: as each shard was indexed. max_pixels: of an image that is decoded.
    """

    def __init__(
        self,
        shards: list[ShardIndex],
        cache: ShardCache | None = None,
        keep: int = OPEN_SHARDS,
        image_key: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.image_key, self.max_pixels = image_key, max_pixels
        self._files: OrderedDict[int, int] = OrderedDict()
        self._tables: OrderedDict[int, Table] = OrderedDict()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2  # two per shard; half is for all else
        self.shards, self.cache, self.keep = shards, cache, min(max(keep, OPEN_SHARDS), descriptors // 2)

    def close(self) -> None:
        """Close the descriptors and drop the tables. A later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._tables.clear()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict:
        """Return the state without descriptors and mappings, which cannot be pickled."""
        return self.__dict__ | {"_files": OrderedDict(), "_tables": OrderedDict()}

    def read(self, shard: int, row: int) -> tuple[str, dict[str, memoryview]]:
        """Return key and members (extension → bytes). Raises DataError when the shard has changed since it was
        indexed."""
        table, tar = self.table(shard), self.shards[shard].tar
        offset, length = table.place(row)
        data = bytearray(length)  # the system writes it, the parser slices it, decoders read it: no copy
        if _read_into(data, self._file(shard), offset, tar) < length:
            raise DataError(f"{tar}: has shrunk since it was opened; copy or build it again")
        try:
            key, members = parse_sample(data)
            for link in table.links.get(row, ()):
                members[link.extension] = self._linked(shard, link)
        except tarfile.TarError:
            key, members = "", {}  # there is no tar member any more
        if key != table.keys[row]:
            raise DataError(
                f"{tar}: has changed since it was indexed: at byte {offset} is {key or 'no sample'!r} where "
                f"{table.keys[row]!r} should be; if that is on purpose, {self.shards[shard].fix}"
            )
        return key, members

    def label(self, shard: int, row: int) -> int:
        """Return the class number of a sample; NO_LABEL if there is none."""
        return self.table(shard).labels.item(row)

    def image_of(self, shard: int, members: Iterable[str]) -> str | None:
        """Return which of a sample's members (extensions) is its image; None when it has none."""
        return SampleFormat(image_key=self.image_key or self.table(shard).stored.get("image_key")).image_of(members)

    def table(self, shard: int) -> Table:
        """Return keys and places of a shard's samples, from its index. Raises DataError when the index has changed."""
        if shard not in self._tables:
            try:
                self._tables[shard] = self.shards[shard].table()
            except ValueError as error:
                raise DataError(str(error)) from None
            if len(self._tables) > self.keep:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def prefetch(self, shards: Iterable[int]) -> None:
        """Announce shards that will be read soon, in this order: remote ones are downloaded in the background."""
        if self.cache:
            indexes = (self.shards[shard] for shard in shards)
            self.cache.prefetch([(i.tar, i.tar_bytes, i.sha256) for i in indexes if is_remote(i.tar)])

    def _linked(self, shard: int, link: Link) -> memoryview:
        """Return the bytes of a hard link's target. Raises TarError when it is not there any more."""
        data = bytearray(link.length)
        _read_into(data, self._file(shard), link.offset, self.shards[shard].tar)
        return linked_bytes(data)

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = self._open(self.shards[shard])
            if len(self._files) > self.keep:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, index: ShardIndex) -> int:
        """Return a descriptor. Raises DataError when the shard is missing or has another size."""
        if is_remote(index.tar):
            return self._open_remote(index)
        try:
            descriptor = os.open(index.tar, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{index.tar}: cannot be opened: {error.strerror}") from None
        if (size := os.fstat(descriptor).st_size) != index.tar_bytes:
            os.close(descriptor)
            raise DataError(f"{index.tar}: has changed: {size} bytes where {index.tar_bytes} were indexed")
        return descriptor

    def _open_remote(self, index: ShardIndex) -> int:
        if not self.cache:
            raise DataError(f"{index.tar}: remote shards need a folder on the node: data.cache_dir=DIR")
        try:
            return self.cache.open(index.tar, index.tar_bytes, index.sha256)
        except ValueError as error:
            raise DataError(str(error)) from None


def _read_into(data: bytearray, descriptor: int, offset: int, tar: str) -> int:
    try:
        return os.preadv(descriptor, [data], offset)
    except OSError as error:  # a fault of the disk or of a network file system
        raise DataError(f"{tar}: cannot be read at byte {offset}: {error.strerror}") from None

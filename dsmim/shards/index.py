"""The tar index: where each sample of a WebDataset shard begins, how long it is, its key and its class number.

A sidecar file `SHARD.tar.dsmi` holds 512 bytes of JSON (what the shard was when it was indexed), then per sample two
little-endian uint32, offset and length in tar blocks of 512 bytes, then the keys and the labels, compressed, and, only
where a tar needs it, how its samples are read and which of their members are hard links. The start of a run reads the
512 bytes; the rest is mapped when the order of samples reaches the shard. A sample takes 8 bytes and, with ImageNet's
names, about 9 more for key and label.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dsmim.shards.atomic import write_atomically
from dsmim.shards.remote import is_remote
from dsmim.shards.sample_format import DEFAULT, NO_LABEL, SampleFormat
from dsmim.shards.scan import Contents, scan
from dsmim.shards.sidecar import SUFFIX, index_file, shard_name
from dsmim.shards.table import Rows, Table, labels_and_extra, pack_extra, read_extra, read_rows, renumbered
from dsmim.shards.tar import BLOCK, read_sample

VERSION = 2
PAGE = 512  # bytes of JSON before the records


@dataclass(frozen=True)
class ShardIndex:
    """What is known about one shard without opening it."""

    tar: str
    """Path or URL."""
    file: str
    """Path of the sidecar."""
    samples: int
    """Samples in use."""
    tar_bytes: int
    sha256: str
    """Digest of the whole tar."""
    stored: int
    """Samples that the sidecar describes: more than `samples` when a subset is in use."""
    key_bytes: int
    """Compressed size of the keys."""
    rows: Rows | None = None
    unlabelled: int | None = None
    """Stored samples without a class number; None: written by a version that did not count them."""
    highest: int | None = None
    """Highest class number of the stored samples; None as above."""
    variant: str = ""
    """Identifies labels and image that were not chosen by the default rule; they are part of the data's fingerprint."""
    classes: tuple[int, ...] = ()
    """The class numbers in use, which their places here replace; without any, all are in use as they are."""

    def table(self) -> Table:
        """Read the records of the sidecar. Raises ValueError when it has changed since it was opened."""
        with self._open() as file:
            blocks = np.memmap(file, "<u4", mode="r", offset=PAGE, shape=(self.stored, 2))
            file.seek(PAGE + 8 * self.stored)
            keys = zlib.decompress(file.read(self.key_bytes)).decode("utf-8", "surrogateescape").split("\0")
            labels, extra = labels_and_extra(file.read())
        table = Table(blocks, keys, labels, *read_extra(extra))
        table = table if self.rows is None else table.take(read_rows(self.rows))
        return self._chosen(table) if self.classes else table

    def labels(self) -> np.ndarray:
        """Read the labels of the samples in use alone, (samples,) int32. Raises ValueError as `table` does."""
        with self._open() as file:
            file.seek(PAGE + 8 * self.stored + self.key_bytes)
            labels, _ = labels_and_extra(file.read())
        labels = labels if self.rows is None else labels[read_rows(self.rows)]
        if self.classes:
            labels = renumbered(labels, self.classes)
            labels = labels[labels != NO_LABEL]
        return labels

    def with_classes(self, classes: tuple[int, ...]) -> ShardIndex:
        """Return the shard reduced to the samples of some classes, which are numbered by their places."""
        chosen = replace(self, classes=classes)
        return replace(chosen, samples=len(chosen.labels()))

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with open(self.file, "rb") as file:  # noqa: PTH123 - a str: a run may hold a million of them
                if json.loads(file.read(PAGE))["sha256"] != self.sha256:
                    raise ValueError("it describes another tar")
                yield file
        except (OSError, ValueError, KeyError, zlib.error) as error:
            raise ValueError(f"{self.file}: changed since it was opened ({error}); start again") from None

    def _chosen(self, table: Table) -> Table:
        labels = renumbered(table.labels, self.classes)
        rows = np.flatnonzero(labels != NO_LABEL)
        return replace(table.take(rows), labels=labels[rows])

    @property
    def fix(self) -> str:
        """The command to run when the shard was changed on purpose."""
        index_dir = "" if self.file == self.tar + SUFFIX else str(Path(self.file).parent)
        return _fix(self.tar, index_dir, "--force ")


class Described(NamedTuple):
    """What describe_tar found."""

    contents: Contents
    tar_bytes: int
    sha256: str
    format: SampleFormat


def write_index(tar: str | Path, index_dir: str | Path | None = None, form: SampleFormat = DEFAULT) -> ShardIndex:
    """Index one local shard and write its sidecar atomically.

    Raises ValueError naming the shard when it is no complete tar, contains a key twice, or contains no image.
    """
    return write_sidecar(str(tar), index_file(str(tar), index_dir), *describe_tar(Path(tar), str(tar), form))


def describe_tar(path: Path, name: str, form: SampleFormat = DEFAULT) -> Described:
    """Return contents, size and SHA-256 of the tar at `path`. Raises ValueError, which calls it `name`, when it is
    damaged or changes while it is read."""
    before = path.stat()
    contents = scan(path, name, form)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (path.stat().st_size, path.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ValueError(f"{name}: changed while it was being indexed; index it again when its writer has finished")
    return Described(contents, before.st_size, digest, form)


def write_sidecar(
    tar: str, path: str, contents: Contents, tar_bytes: int, sha256: str, form: SampleFormat = DEFAULT
) -> ShardIndex:
    """Write the sidecar `path` of a tar atomically. Raises ValueError when the tar is too large or writing fails."""
    if tar_bytes >= BLOCK * 2**32:
        raise ValueError(f"{tar}: {tar_bytes} bytes; an index covers at most 2 TiB: build smaller shards")
    samples, numbers = contents.samples, [sample.label for sample in contents.samples]
    blocks = np.array([(s.offset // BLOCK, s.length // BLOCK) for s in samples], "<u4")
    keys = zlib.compress("\0".join(s.key for s in samples).encode("utf-8", "surrogateescape"), 9)
    labels, extra = zlib.compress(np.array(numbers, "<i4").tobytes(), 9), pack_extra(samples, form)
    about = {"dsmim_index": VERSION, "samples": len(samples), "tar_bytes": tar_bytes, "sha256": sha256}
    about |= {"key_bytes": len(keys), "label_bytes": len(labels), "extra_bytes": len(extra)}
    about |= {"unlabelled": numbers.count(NO_LABEL), "highest": max(numbers), "variant": _variant(form, numbers)}
    page = json.dumps(about).encode().ljust(PAGE)
    try:
        write_atomically(Path(path), page + blocks.tobytes() + keys + labels + extra)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose a folder by --index-dir") from None
    return _index_of(about, tar, path)


def read_index(tar: str | Path, index_dir: str | Path | None = None) -> ShardIndex:
    """Read the index of a shard. Raises ValueError when it is missing or broken, or the tar has changed since.

    It costs two stats and one short read, because a run starts by doing this for every shard.
    """
    tar = str(tar)
    path = index_file(tar, index_dir)
    fix = _fix(tar, index_dir)
    try:
        descriptor = os.open(path, os.O_RDONLY)  # a file object or a Path would take most of the time
        try:
            page, sidecar = os.read(descriptor, PAGE), os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ValueError(f"{tar}: has no index ({path}); {fix}") from None
    index = parse_page(page, sidecar.st_size, tar, path, fix)
    if not is_remote(tar):
        _check_tar(index, os.stat(tar), sidecar, fix)  # noqa: PTH116 - as above
    return index


def stored_format(tar: str, index_dir: str | Path | None = None) -> dict[str, str]:
    """Return how the samples were read when a shard was indexed (SampleFormat.stored), also when the shard has changed
    since; nothing without a readable index. Raises ValueError as `index_file` does."""
    path = index_file(tar, index_dir)
    try:
        with Path(path).open("rb") as file:
            page, size = file.read(PAGE), os.fstat(file.fileno()).st_size
        return parse_page(page, size, tar, path, fix="").table().stored
    except (OSError, ValueError):
        return {}


def fingerprint(indexes: list[ShardIndex]) -> str:
    """Return one digest of the whole data set: the shards in order, their contents and which samples are in use."""
    lines = [f"{shard_name(index.tar)} {index.samples} {index.sha256}" for index in indexes]
    lines += [indexes[0].rows.digest] if indexes[0].rows else []
    lines += [f"{shard_name(index.tar)} {index.variant}" for index in indexes if index.variant]
    lines += [f"classes {indexes[0].classes}"] if indexes[0].classes else []
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def parse_page(page: bytes, size: int, tar: str, path: str, fix: str) -> ShardIndex:
    """Return the index at the beginning of a sidecar of `size` bytes. Raises ValueError, whose text ends with `fix`,
    when it is none."""
    try:
        about = json.loads(page[:PAGE])
        if about["dsmim_index"] != VERSION:
            raise ValueError(f"{path}: was written by another version of dsmim; {fix}")
        index = _index_of(about, tar, path)
        rest = about["key_bytes"] + about["label_bytes"] + about.get("extra_bytes", 0)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: is no dsmim index; {fix}") from None
    if size != PAGE + 8 * index.stored + rest:
        raise ValueError(f"{path}: was cut short; {fix}")
    return index


def _index_of(about: dict[str, Any], tar: str, path: str) -> ShardIndex:
    samples, optional = about["samples"], {name: about.get(name) for name in ("unlabelled", "highest")}
    return ShardIndex(
        tar, path, samples, about["tar_bytes"], about["sha256"], samples, about["key_bytes"],
        **optional, variant=about.get("variant", ""),
    )  # fmt: skip


def _variant(form: SampleFormat, labels: list[int]) -> str:
    """Return what identifies labels or images that were not found by the default rule, else nothing."""
    if form == DEFAULT:
        return ""
    return hashlib.sha256(f"{form.image_key} {labels}".encode()).hexdigest()[:16]


def _check_tar(index: ShardIndex, tar: os.stat_result, sidecar: os.stat_result, fix: str) -> None:
    if tar.st_size < index.tar_bytes:
        raise ValueError(
            f"{index.tar}: has {tar.st_size} bytes of the {index.tar_bytes} that were indexed: truncated; copy or "
            f"build it again, or if it was replaced on purpose, {fix}"
        )
    newer = tar.st_mtime_ns > sidecar.st_mtime_ns
    if tar.st_size != index.tar_bytes or (newer and not _holds_samples(index)):
        raise ValueError(f"{index.file}: index is older than its tar, which has changed since; {fix}")


def _holds_samples(index: ShardIndex) -> bool:
    """Return whether the first, middle and last sample are where the index says: a folder that was copied without its
    times is still valid. (Each read, and `shards verify`, check more.)"""
    table = index.table()
    with Path(index.tar).open("rb") as file:
        rows = (0, index.stored // 2, index.stored - 1)
        return all(read_sample(file, *table.whole(row))[0] == table.keys[row] for row in rows)


def _fix(tar: str, index_dir: str | Path | None, force: str = "") -> str:
    where = f" --index-dir {shlex.quote(str(index_dir))}" if index_dir else ""
    return f"run: dsmim shards index {force}{shlex.quote(tar)}{where}"

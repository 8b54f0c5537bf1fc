"""The tar index: where each sample of a WebDataset shard begins, how long it is, its key and its class number.

A sidecar file `SHARD.tar.dsmi` holds 512 bytes of JSON (what the shard was when it was indexed), then per sample two
little-endian uint32, offset and length in tar blocks of 512 bytes, then the keys and the labels, compressed. The start
of a run reads the 512 bytes; the rest is mapped when the order of samples reaches the shard. A sample takes 8 bytes
and, with ImageNet's names, about 9 more for key and label.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from dsmim.shards.atomic import write_atomically
from dsmim.shards.remote import is_remote
from dsmim.shards.tar import BLOCK, Sample, read_sample, scan

SUFFIX = ".dsmi"
VERSION = 2
PAGE = 512  # bytes of JSON before the records


@dataclass(frozen=True)
class Rows:
    """Which of a shard's samples are in use: a range of the row numbers in the file of a subset (subset.py)."""

    file: str
    begin: int
    end: int
    digest: str
    """Digest of the whole subset."""


@dataclass(frozen=True)
class Table:
    """The samples of one shard, or those of a subset, in the order of the tar."""

    blocks: np.ndarray
    """(samples, 2) uint32: offset and length in blocks of 512 bytes."""
    keys: list[str]
    labels: np.ndarray
    """(samples,) int32: class numbers; NO_LABEL where there is none."""

    def place(self, row: int) -> tuple[int, int]:
        """Return offset and length of a sample in bytes."""
        offset, length = self.blocks[row].tolist()
        return offset * BLOCK, length * BLOCK

    def take(self, rows: np.ndarray) -> Table:
        """Return the table of the given rows alone."""
        return Table(self.blocks[rows], [self.keys[row] for row in rows], self.labels[rows])


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

    def table(self) -> Table:
        """Read the records of the sidecar. Raises ValueError when it has changed since it was opened."""
        try:
            with open(self.file, "rb") as file:  # noqa: PTH123 - a str: a run may hold a million of them
                if json.loads(file.read(PAGE))["sha256"] != self.sha256:
                    raise ValueError("it describes another tar")
                blocks = np.memmap(file, "<u4", mode="r", offset=PAGE, shape=(self.stored, 2))
                file.seek(PAGE + 8 * self.stored)
                keys = zlib.decompress(file.read(self.key_bytes)).decode("utf-8", "surrogateescape").split("\0")
                labels = np.frombuffer(zlib.decompress(file.read()), "<i4")
        except (OSError, ValueError, KeyError, zlib.error) as error:
            raise ValueError(f"{self.file}: changed since it was opened ({error}); start again") from None
        table = Table(blocks, keys, labels)
        return table if self.rows is None else table.take(read_rows(self.rows))

    @property
    def fix(self) -> str:
        """The command to run when the shard was changed on purpose."""
        index_dir = "" if self.file == self.tar + SUFFIX else str(Path(self.file).parent)
        return _fix(self.tar, index_dir, "--force ")


def read_rows(rows: Rows) -> np.ndarray:
    """Read the row numbers, (end - begin,). Raises ValueError when the subset has changed since it was opened."""
    from safetensors import SafetensorError, safe_open

    if rows.begin == rows.end:  # safetensors refuses an empty slice
        return np.zeros(0, np.uint32)
    try:
        with safe_open(rows.file, "np") as file:
            if file.metadata()["digest"] == rows.digest:
                return file.get_slice("rows")[rows.begin : rows.end]
    except (OSError, SafetensorError):
        pass
    raise ValueError(f"{rows.file}: changed since it was opened; start again")


def shard_name(tar: str) -> str:
    """Return the name of the shard's file; of a URL without its query, which changes with every signature."""
    return _folder_and_name(tar)[1]


def index_file(tar: str, index_dir: str | Path | None = None) -> str:
    """Return the path of a tar's sidecar: beside the tar, or in index_dir.

    In index_dir its name includes a digest of the tar's folder, since train/000.tar and val/000.tar may share one
    index_dir. Raises ValueError for a remote tar without index_dir.
    """
    if not index_dir:
        if is_remote(tar):
            raise ValueError(
                f"{tar}: the indexes of remote shards are kept in a local folder: data.index_dir=DIR in a recipe, "
                f"--index-dir DIR for the shards commands; run: dsmim shards index {shlex.quote(tar)} --index-dir DIR"
            )
        return tar + SUFFIX
    folder, name = _folder_and_name(tar)
    return os.path.join(index_dir, f"{name}.{_folder_mark(folder)}{SUFFIX}")  # noqa: PTH118 - as above


def write_index(tar: str | Path, index_dir: str | Path | None = None, copy: Path | None = None) -> ShardIndex:
    """Index one shard and write its sidecar atomically. copy: a local file with the bytes of a remote shard.

    Raises ValueError naming the shard when it is no complete tar, contains a key twice, or contains no image.
    """
    return write_sidecar(str(tar), index_file(str(tar), index_dir), *describe_tar(copy or Path(tar), str(tar)))


def describe_tar(path: Path, name: str) -> tuple[list[Sample], int, str]:
    """Return samples, size and SHA-256 of the tar at `path`. Raises ValueError, which calls it `name`, when it is
    damaged or changes while it is read."""
    before = path.stat()
    samples = scan(path, name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (path.stat().st_size, path.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ValueError(f"{name}: changed while it was being indexed; index it again when its writer has finished")
    return samples, before.st_size, digest


def write_sidecar(tar: str, path: str, samples: list[Sample], tar_bytes: int, sha256: str) -> ShardIndex:
    """Write the sidecar `path` of a tar atomically. Raises ValueError when the tar is too large or writing fails."""
    if tar_bytes >= BLOCK * 2**32:
        raise ValueError(f"{tar}: {tar_bytes} bytes; an index covers at most 2 TiB: build smaller shards")
    blocks = np.array([(s.offset // BLOCK, s.length // BLOCK) for s in samples], "<u4")
    keys = zlib.compress("\0".join(s.key for s in samples).encode("utf-8", "surrogateescape"), 9)
    labels = zlib.compress(np.array([s.label for s in samples], "<i4").tobytes(), 9)
    about = {"dsmim_index": VERSION, "samples": len(samples), "tar_bytes": tar_bytes, "sha256": sha256}
    about |= {"key_bytes": len(keys), "label_bytes": len(labels)}
    try:
        write_atomically(Path(path), json.dumps(about).encode().ljust(PAGE) + blocks.tobytes() + keys + labels)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose a folder by --index-dir") from None
    return ShardIndex(tar, path, len(samples), tar_bytes, sha256, len(samples), len(keys))


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


def fingerprint(indexes: list[ShardIndex]) -> str:
    """Return one digest of the whole data set: the shards in order, their contents and which samples are in use."""
    lines = [f"{shard_name(index.tar)} {index.samples} {index.sha256}" for index in indexes]
    lines += [indexes[0].rows.digest] if indexes[0].rows else []
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def parse_page(page: bytes, size: int, tar: str, path: str, fix: str) -> ShardIndex:
    """Return the index at the beginning of a sidecar of `size` bytes. Raises ValueError, whose text ends with `fix`,
    when it is none."""
    try:
        about = json.loads(page[:PAGE])
        if about["dsmim_index"] != VERSION:
            raise ValueError(f"{path}: was written by another version of dsmim; {fix}")
        samples, rest = about["samples"], about["key_bytes"] + about["label_bytes"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: is no dsmim index; {fix}") from None
    if size != PAGE + 8 * samples + rest:
        raise ValueError(f"{path}: was cut short; {fix}")
    return ShardIndex(tar, path, samples, about["tar_bytes"], about["sha256"], samples, about["key_bytes"])


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
        return all(read_sample(file, *table.place(row))[0] == table.keys[row] for row in rows)


def _folder_and_name(tar: str) -> tuple[str, str]:
    if tar.startswith("pipe:"):
        return tar, "pipe"
    if is_remote(tar):
        folder, _, name = urlsplit(tar)._replace(query="", fragment="").geturl().rpartition("/")
        return folder, name  # without the query, which changes with every signature
    folder, name = os.path.split(tar)
    return _resolved(folder), name


@lru_cache(maxsize=256)
def _resolved(folder: str) -> str:
    return str(Path(folder).resolve())


@lru_cache(maxsize=256)
def _folder_mark(folder: str) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]


def _fix(tar: str, index_dir: str | Path | None, force: str = "") -> str:
    where = f" --index-dir {shlex.quote(str(index_dir))}" if index_dir else ""
    return f"run: dsmim shards index {force}{shlex.quote(tar)}{where}"

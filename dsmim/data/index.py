"""The tar index: where each sample of a WebDataset shard begins and how long it is.

A sidecar file `SHARD.tar.dsmi` holds one page of JSON (what the shard was when it was indexed), then two
little-endian uint64 per sample: the offset of its first tar header, and the bytes up to the end of its last member.
The file is memory-mapped: 16 bytes a sample on disk, shared between processes. Keys are not stored; they stand in
the tar headers that a read fetches anyway.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

SUFFIX = ".dsmi"
VERSION = 1
PAGE = 4096  # bytes of JSON before the records
BLOCK = tarfile.BLOCKSIZE
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
# WebDataset's rule: the key ends at the first dot of the file's name, folders belong to the key.
_MEMBER = re.compile(r"^((?:.*/|)[^./][^.]*)\.([^/]*)$")


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard."""

    tar: Path
    file: Path
    samples: int
    tar_bytes: int
    sha256: str
    """Digest of the whole tar."""

    @cached_property
    def records(self) -> np.ndarray:
        """(samples, 2) uint64: offset and length in bytes."""
        if not self.samples:
            return np.zeros((0, 2), "<u8")
        return np.memmap(self.file, "<u8", mode="r", offset=PAGE, shape=(self.samples, 2))

    def __getstate__(self) -> dict:
        """Without the mapping: a worker process maps the file itself."""
        return {key: value for key, value in self.__dict__.items() if key != "records"}


def index_file(tar: Path, index_dir: str | Path | None = None) -> Path:
    """Where the sidecar of a tar lies: beside it; or in index_dir, where its name tells the tar's folder apart, since
    train/000.tar and val/000.tar may share one index_dir."""
    if not index_dir:
        return tar.parent / (tar.name + SUFFIX)
    folder = hashlib.sha256(str(tar.parent.resolve()).encode()).hexdigest()[:8]
    return Path(index_dir) / f"{tar.name}.{folder}{SUFFIX}"


def split_member(name: str) -> tuple[str, str] | None:
    """('folder/000', 'jpg') of 'folder/000.jpg'; None for names that make no sample (no extension, hidden files)."""
    match = _MEMBER.match(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


def is_image(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS


def write_index(tar: Path, index_dir: str | Path | None = None) -> ShardIndex:
    """Index one shard and write the sidecar atomically.

    Raises ValueError naming the shard when it is no whole tar, a key stands twice, or it holds no image.
    """
    before = tar.stat()
    records = _scan(tar)
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (tar.stat().st_size, tar.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ValueError(f"{tar}: changed while it was being indexed; index it again when its writer has finished")
    path = index_file(tar, index_dir)
    index = ShardIndex(tar, path, len(records), before.st_size, digest)
    about = {"dsmim_index": VERSION, "samples": len(records), "tar_bytes": before.st_size, "sha256": digest}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(json.dumps(about).encode().ljust(PAGE))
        file.write(np.asarray(records, "<u8").tobytes())
    temporary.replace(path)
    return index


def read_index(tar: Path, index_dir: str | Path | None = None) -> ShardIndex:
    """The index of a shard. Raises ValueError when it is missing, broken, or older than the tar."""
    path = index_file(tar, index_dir)
    mend = f"run: dsmim shards index {tar}" + (f" --index-dir {index_dir}" if index_dir else "")
    if not path.is_file():
        raise ValueError(f"{tar}: has no index ({path.name}); {mend}")
    with path.open("rb") as file:
        page = file.read(PAGE)
    try:
        header = json.loads(page)
        version, samples = header["dsmim_index"], header["samples"]
        index = ShardIndex(tar, path, samples, header["tar_bytes"], header["sha256"])
    except (ValueError, KeyError):
        raise ValueError(f"{path}: is no dsmim index; {mend}") from None
    if version != VERSION or path.stat().st_size != PAGE + 16 * samples:
        raise ValueError(f"{path}: was cut short or written by another version of dsmim; {mend}")
    tar_stat = tar.stat()
    if tar_stat.st_size < index.tar_bytes:
        raise ValueError(
            f"{tar}: has {tar_stat.st_size} bytes of the {index.tar_bytes} that were indexed: truncated; copy or build "
            f"it again, or if it was replaced on purpose, {mend}"
        )
    if tar_stat.st_size != index.tar_bytes or tar_stat.st_mtime_ns > path.stat().st_mtime_ns:
        raise ValueError(f"{path}: index is older than its tar, which has changed since; {mend}")
    return index


def fingerprint(indexes: list[ShardIndex]) -> str:
    """One digest of the whole data set: shards in order, their contents and sample counts."""
    lines = [f"{index.tar.name} {index.samples} {index.sha256}" for index in indexes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parse_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members (extension → bytes) of the stretch of a tar that one record of the index names."""
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if member.isfile() and (name := split_member(member.name)):
                key = name[0]
                members[name[1]] = archive.extractfile(member).read()
    return key, members


def _scan(tar: Path) -> list[tuple[int, int]]:
    """(offset, length) of every sample that holds an image."""
    samples: list[tuple[int, int]] = []
    seen: set[str] = set()
    current, start, end, has_image = None, 0, 0, False
    for name, offset, stop in _members(tar):
        key, extension = name
        if key != current:
            if has_image:
                samples.append((start, end - start))
            if key in seen:
                raise ValueError(f"{tar}: key {key!r} stands twice; every key must be one run of neighbouring files")
            seen.add(key)
            current, start, has_image = key, offset, False
        end, has_image = stop, has_image or is_image(extension)
    if has_image:
        samples.append((start, end - start))
    if not samples:
        raise ValueError(f"{tar}: holds no image (looked for {', '.join(IMAGE_EXTENSIONS)})")
    return samples


def _members(tar: Path):
    """((key, extension), offset of the first header, end of the data) of every file, in order."""
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for member in archive:
                stop = member.offset_data + -(-member.size // BLOCK) * BLOCK if member.isfile() else member.offset_data
                if stop > size:
                    raise ValueError(f"{tar}: cut short inside {member.name!r} at byte {size}; copy or build it again")
                if member.isfile() and (name := split_member(member.name)):
                    yield name, member.offset, stop
                archive.members.clear()  # tarfile would keep every header of the shard in memory
            _check_end(tar, archive.offset, size)
    except tarfile.TarError as error:
        raise ValueError(f"{tar}: no readable tar ({error}); copy or build it again") from None


def _check_end(tar: Path, offset: int, size: int) -> None:
    """tarfile takes a bad header, and the end of the file, for the end of the archive: tell them apart."""
    with tar.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ValueError(f"{tar}: cut short at byte {size}, before the end-of-archive mark; copy or build it again")
    if block.count(0) != BLOCK:
        raise ValueError(f"{tar}: bad tar header at byte {offset}; copy or build it again")

"""WebDataset tars from any source: which samples a tar contains, and the members of one sample.

A sample is a run of successive members that share a key (webdataset's rule), one of which is an image. Headers are
read by Python's tarfile, which knows ustar, GNU and pax.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dsmim.shards.extensions import LOOKED_FOR, is_image

BLOCK = tarfile.BLOCKSIZE
NO_LABEL = -1
# WebDataset's rule: the key ends at the first dot of the file's name and includes its folders.
_MEMBER = re.compile(r"^((?:.*/|)[^./][^.]*)\.([^/]+)$")


class Sample(NamedTuple):
    """Where a sample is in its tar."""

    key: str
    offset: int
    """Bytes before its first header; a multiple of 512."""
    length: int
    """Bytes up to the end of its last member's last block."""
    label: int
    """The class number (an integer from 0) in KEY.cls; NO_LABEL if there is none."""


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    end: int
    label: int


def split_member(name: str) -> tuple[str, str] | None:
    """Split 'folder/000.jpg' into ('folder/000', 'jpg'); return None for names that belong to no sample (no extension,
    hidden files)."""
    match = _MEMBER.match(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


def scan(tar: Path, name: str) -> list[Sample]:
    """Return every sample of a tar that has an image, in order.

    Raises ValueError, which calls the tar `name`, when it is no complete tar, contains a key or a member twice, or
    contains no image.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    for members in _runs(tar, name):
        key, extensions = members[0].key, [member.extension for member in members]
        if key in seen:
            raise ValueError(f"{name}: key {key!r} occurs twice; all files of a key must follow one another")
        seen.add(key)
        if twice := next((e for e in extensions if extensions.count(e) > 1), None):
            raise ValueError(f"{name}: {key}.{twice} occurs twice; build the shard again")
        if any(map(is_image, extensions)):
            label = max(member.label for member in members)
            samples.append(Sample(key, members[0].offset, members[-1].end - members[0].offset, label))
    if not samples:
        raise ValueError(f"{name}: contains no image ({LOOKED_FOR})")
    return samples


def parse_sample(data: bytes | bytearray) -> tuple[str, dict[str, memoryview]]:
    """Return key and members (extension → bytes, not copied) of the part of a tar that contains one sample.

    Raises tarfile.TarError when it does not begin with a tar header.
    """
    members: dict[str, memoryview] = {}
    view, key, offset = memoryview(data), "", 0
    while offset < len(data):
        plain = _plain_header(data, offset)
        if plain is None:
            return _parse_any(data)
        name, size = plain
        offset += BLOCK
        if parts := split_member(name):
            key = parts[0]
            members[parts[1]] = view[offset : offset + size]
        offset += _padded(size)
    return key, members


def _plain_header(data: bytes | bytearray, offset: int) -> tuple[str, int] | None:
    """Return name and size of a regular file with a short name; None for every other header, which tarfile then reads.

    tarfile takes as long for one header as all else that reading a sample needs. Layout: POSIX.1-1988 ustar. The
    checksum is ignored: a header that was damaged after indexing gives another key than the index, or no number.
    """
    if len(data) - offset < BLOCK or data[offset + 156] not in b"0\0":
        return None
    magic, prefix = data[offset + 257 : offset + 265], data[offset + 345]
    if magic == b"ustar  \0" and prefix:  # old GNU: it has times where ustar has a prefix
        return None
    size = bytes(data[offset + 124 : offset + 136]).strip(b"\0 ")
    if not size.isdigit():  # base 256, used above 8 GiB; or damage
        return None
    name = bytes(data[offset : offset + 100]).partition(b"\0")[0]
    if magic[:6] == b"ustar\0" and prefix:
        name = bytes(data[offset + 345 : offset + 500]).partition(b"\0")[0] + b"/" + name
    try:
        return name.decode("utf-8", "surrogateescape"), int(size, 8)
    except ValueError:
        return None


def read_sample(file: BinaryIO, offset: int, length: int) -> tuple[str, dict[str, memoryview]]:
    """Read and parse a part of an open tar, as parse_sample does; the key is "" when no sample is there."""
    file.seek(offset)
    try:
        return parse_sample(file.read(length))
    except tarfile.TarError:
        return "", {}


def _parse_any(data: bytes | bytearray) -> tuple[str, dict[str, memoryview]]:
    members: dict[str, memoryview] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if member.isfile() and (name := split_member(member.name)):
                key = name[0]
                members[name[1]] = memoryview(bytearray(archive.extractfile(member).read()))
    return key, members


def _runs(tar: Path, name: str) -> Iterator[list[_Member]]:
    """Yield the successive members of one key."""
    run: list[_Member] = []
    for member in _members(tar, name):
        if run and member.key != run[0].key:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _members(tar: Path, name: str) -> Iterator[_Member]:
    """Yield every file that belongs to a sample, in order."""
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for member in archive:
                stop = archive.offset  # of the next header: a sparse member takes less than its size
                if stop > size:
                    raise ValueError(f"{name}: cut short inside {member.name!r} at byte {size}; copy or build it again")
                if member.isfile() and (parts := split_member(member.name)):
                    label = _label(archive.extractfile(member).read()) if parts[1] == "cls" else NO_LABEL
                    yield _Member(*parts, member.offset, stop, label)
                archive.members.clear()  # else tarfile keeps every header of the shard in memory
            _check_end(tar, name, archive.offset, size)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: no readable tar ({error}); copy or build it again") from None


def _check_end(tar: Path, name: str, offset: int, size: int) -> None:
    """Check that the archive ends here: tarfile also stops, silently, at a bad header and at the end of the file."""
    with tar.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ValueError(f"{name}: cut short at byte {size}, before the end-of-archive mark; copy or build it again")
    if block.count(0) != BLOCK:
        raise ValueError(f"{name}: bad tar header at byte {offset}; copy or build it again")


def _label(text: bytes) -> int:
    """Return the class number; NO_LABEL for other text, which a task may know how to read."""
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) < 10 else NO_LABEL


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

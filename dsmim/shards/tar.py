"""WebDataset tars, anyone's: which samples a tar holds, and the members of one sample.

A sample is a run of neighbouring members that share a key (webdataset's rule), one of which is an image. Headers are
read by Python's tarfile, which knows ustar, GNU and pax.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
NO_LABEL = -1
# WebDataset's rule: the key ends at the first dot of the file's name, folders belong to the key.
_MEMBER = re.compile(r"^((?:.*/|)[^./][^.]*)\.([^/]+)$")


class Sample(NamedTuple):
    """Where a sample stands in its tar."""

    key: str
    offset: int
    """Bytes before its first header; a multiple of 512."""
    length: int
    """Bytes up to the end of its last member's last block."""
    label: int
    """The whole number from 0 in KEY.cls; NO_LABEL without one."""


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    end: int
    label: int


def split_member(name: str) -> tuple[str, str] | None:
    """('folder/000', 'jpg') of 'folder/000.jpg'; None for names that make no sample (no extension, hidden files)."""
    match = _MEMBER.match(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


def is_image(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS


def scan(tar: Path, name: str) -> list[Sample]:
    """Every sample of a tar that holds an image, in order.

    Raises ValueError, which calls the tar `name`, when it is no whole tar, a key or a member stands twice, or it holds
    no image.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    for members in _runs(tar, name):
        key, extensions = members[0].key, [member.extension for member in members]
        if key in seen:
            raise ValueError(f"{name}: key {key!r} stands twice; every key must be one run of neighbouring files")
        seen.add(key)
        if twice := next((e for e in extensions if extensions.count(e) > 1), None):
            raise ValueError(f"{name}: {key}.{twice} stands twice; build the shard again")
        if any(map(is_image, extensions)):
            label = max(member.label for member in members)
            samples.append(Sample(key, members[0].offset, members[-1].end - members[0].offset, label))
    if not samples:
        raise ValueError(f"{name}: holds no image (looked for {', '.join(IMAGE_EXTENSIONS)})")
    return samples


def parse_sample(data: bytes | bytearray) -> tuple[str, dict[str, memoryview]]:
    """Key and members (extension → bytes, not copied) of the stretch of a tar that holds one sample.

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
    """Name and size of a regular file with a short name; None for every other header, which tarfile then judges.

    tarfile itself takes as long for a header as the rest of reading a sample. Layout: POSIX.1-1988 ustar. The checksum
    is not looked at: a header that was damaged after indexing gives another key than the index's, or no number.
    """
    if len(data) - offset < BLOCK or data[offset + 156] not in b"0\0":
        return None
    if (
        data[offset + 257 : offset + 265] == b"ustar  \0" and data[offset + 345]
    ):  # old GNU: times, where ustar has a prefix
        return None
    size = bytes(data[offset + 124 : offset + 136]).strip(b"\0 ")
    if not size.isdigit():  # base 256, for more than 8 GiB; or damage
        return None
    name = bytes(data[offset : offset + 100]).partition(b"\0")[0]
    if data[offset + 257 : offset + 263] == b"ustar\0" and data[offset + 345]:
        name = bytes(data[offset + 345 : offset + 500]).partition(b"\0")[0] + b"/" + name
    try:
        return name.decode("utf-8", "surrogateescape"), int(size, 8)
    except ValueError:
        return None


def read_sample(file: BinaryIO, offset: int, length: int) -> tuple[str, dict[str, memoryview]]:
    """parse_sample of a stretch of an open tar; no key when no sample stands there."""
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
    """Neighbouring members of one key."""
    run: list[_Member] = []
    for member in _members(tar, name):
        if run and member.key != run[0].key:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _members(tar: Path, name: str) -> Iterator[_Member]:
    """Every file that belongs to a sample, in order."""
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for member in archive:
                stop = archive.offset  # of the next header: a sparse member's size is not what it takes up
                if stop > size:
                    raise ValueError(f"{name}: cut short inside {member.name!r} at byte {size}; copy or build it again")
                if member.isfile() and (parts := split_member(member.name)):
                    label = _label(archive.extractfile(member).read()) if parts[1] == "cls" else NO_LABEL
                    yield _Member(*parts, member.offset, stop, label)
                archive.members.clear()  # tarfile would keep every header of the shard in memory
            _check_end(tar, name, archive.offset, size)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: no readable tar ({error}); copy or build it again") from None


def _check_end(tar: Path, name: str, offset: int, size: int) -> None:
    """tarfile takes a bad header, and the end of the file, for the end of the archive: tell them apart."""
    with tar.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ValueError(f"{name}: cut short at byte {size}, before the end-of-archive mark; copy or build it again")
    if block.count(0) != BLOCK:
        raise ValueError(f"{name}: bad tar header at byte {offset}; copy or build it again")


def _label(text: bytes) -> int:
    """Labels that are no class number are training's affair: another task may know what they mean."""
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) < 10 else NO_LABEL


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

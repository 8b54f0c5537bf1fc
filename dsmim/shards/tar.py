"""One sample of a tar: its members, parsed from the bytes between its first header and its end.

A hard link in a tar stands for an earlier member: its bytes are read there.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from dsmim.shards.names import split_member

BLOCK = tarfile.BLOCKSIZE


class Link(NamedTuple):
    """A member of a sample whose bytes are elsewhere in its tar."""

    extension: str
    offset: int
    """Bytes before the header of the member that it is linked to."""
    length: int


def parse_sample(data: bytes | bytearray) -> tuple[str, dict[str, memoryview]]:
    """Return key and members (extension → bytes, not copied) of the part of a tar that contains one sample.

    Links are not among the members. Raises tarfile.TarError when the data do not begin with a tar header.
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


def read_sample(
    file: BinaryIO, offset: int, length: int, links: Iterable[Link] = ()
) -> tuple[str, dict[str, memoryview]]:
    """Read and parse a part of an open tar, as parse_sample does, with the members that it links to.

    The key is "" when no sample, or no linked member, is there.
    """
    file.seek(offset)
    try:
        key, members = parse_sample(file.read(length))
        for link in links:
            file.seek(link.offset)
            members[link.extension] = linked_bytes(file.read(link.length))
    except tarfile.TarError:
        return "", {}
    return key, members


def linked_bytes(data: bytes | bytearray) -> memoryview:
    """Return the bytes of the only member in a part of a tar. Raises tarfile.TarError when there is none."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        member = archive.next()
        if member is None or not member.isfile():
            raise tarfile.TarError("the member of a hard link is not there")
        return memoryview(bytearray(archive.extractfile(member).read()))


def _parse_any(data: bytes | bytearray) -> tuple[str, dict[str, memoryview]]:
    members: dict[str, memoryview] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if (member.isfile() or member.islnk()) and (name := split_member(member.name)):
                key = name[0]
                if member.isfile():
                    members[name[1]] = memoryview(bytearray(archive.extractfile(member).read()))
    return key, members


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

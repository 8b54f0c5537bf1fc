"""WebDataset tars from any source: which samples a tar contains, and what else is in it.

A sample is a run of successive members that share a key (webdataset's rule), one of which is an image. Headers are
read by Python's tarfile, which knows ustar, GNU and pax.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dsmim.shards.extensions import LOOKED_FOR, is_image
from dsmim.shards.names import plain_key, split_member, why_no_member
from dsmim.shards.sample_format import DEFAULT, NO_LABEL, SampleFormat
from dsmim.shards.tally import Tally
from dsmim.shards.tar import BLOCK, Link, linked_bytes

# The first bytes of what people call .tar.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Sample(NamedTuple):
    """Where a sample is in its tar."""

    key: str
    offset: int
    """Bytes before its first header; a multiple of 512."""
    length: int
    """Bytes up to the end of its last member's last block."""
    label: int
    """The class number (an integer from 0); NO_LABEL if there is none."""
    links: tuple[Link, ...] = ()


@dataclass
class Contents:
    """What a tar contains."""

    samples: list[Sample] = field(default_factory=list)
    left_out: Tally = field(default_factory=Tally)
    """Files that belong to no sample, by extension or reason."""
    several: Tally = field(default_factory=Tally)
    """Samples with several images, by the extension that is taken and all of them."""
    unread: Tally = field(default_factory=Tally)
    """Labels that are no class number, by the name of their member."""
    words: set[str] = field(default_factory=set)
    """Names of classes that have no number yet."""
    numbered: int = 0
    """Samples with a class number."""

    def add(self, other: Contents) -> None:
        """Add what another tar contains, without its samples."""
        for tally, more in zip(
            (self.left_out, self.several, self.unread), (other.left_out, other.several, other.unread), strict=True
        ):
            tally.add(more)
        self.words |= other.words
        self.numbered += other.numbered


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    end: int
    text: bytes | None
    """Of the member that holds the label."""
    link: Link | None


def scan(tar: Path, name: str, form: SampleFormat = DEFAULT) -> Contents:
    """Return every sample of a tar that has an image, in order, and what else the tar contains.

    Raises ValueError, which calls the tar `name`, when it is no complete tar, contains a key or a member twice or a
    symbolic link, contains no image, or a label cannot be read.
    """
    contents, seen, dotted = Contents(), set(), ""
    for members in _runs(tar, name, form, contents.left_out):
        key, extensions = members[0].key, [member.extension for member in members]
        if key in seen:
            raise ValueError(
                f"{name}: key {key!r} occurs twice; all files of a key must follow one another, as tar --sort=name "
                f"writes them{_of_dots(members)}"
            )
        seen.add(key)
        if twice := next((e for e in extensions if extensions.count(e) > 1), None):
            raise ValueError(f"{name}: {key}.{twice} occurs twice; build the shard again")
        if form.image_of(extensions):
            _add_sample(contents, members, form, name)
        else:
            for extension in extensions:
                contents.left_out.count(f".{extension}", f"{key}.{extension}")
            dotted = dotted or _of_dots(members)
    if not contents.samples:
        raise ValueError(f"{name}: contains no image ({_looked_for(form)}){_instead(contents.left_out)}{dotted}")
    return contents


def _of_dots(members: list[_Member]) -> str:
    """Return the end of a message about members whose names may have more dots than was meant; empty for others."""
    member = next((m for m in members if "." in m.extension and is_image(m.extension.rpartition(".")[2])), None)
    if member is None:
        return ""
    file, stem = f"{member.key}.{member.extension}".rpartition("/")[2], member.extension.rpartition(".")[0]
    better = f"{file.partition('.')[0]}_{stem.replace('.', '_')}.{member.extension.rpartition('.')[2]}"
    return (
        f". A key ends at the first dot of a file's name, so {file} is the member .{member.extension} of a sample; if "
        f"it is an image of its own, write the tar again with names that have no other dot (such as {better}), as "
        "dsmim shards build does with a folder"
    )


def _add_sample(contents: Contents, members: list[_Member], form: SampleFormat, name: str) -> None:
    key = members[0].key
    text = next((member.text for member in members if member.text is not None), None)
    try:
        label = form.label(key, text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(label, str):
        contents.words.add(label)
        label = NO_LABEL
    elif label != NO_LABEL:
        contents.numbered += 1
    elif text is not None:
        member = form.label_member
        contents.unread.count(f".{member}", f"{key}.{member}: {text[:20].decode(errors='replace')!r}")
    images = [member.extension for member in members if is_image(member.extension)]
    if len(images) > 1 and not form.image_key:
        contents.several.count(f"{form.image_of(images)} of {' and '.join(sorted(images))}", key)
    links = tuple(member.link for member in members if member.link)
    contents.samples.append(Sample(key, members[0].offset, members[-1].end - members[0].offset, label, links))


def _looked_for(form: SampleFormat) -> str:
    return f"looked for {form.image_key}" if form.image_key else LOOKED_FOR


def _instead(left_out: Tally) -> str:
    """Return the end of the message for a tar without images: what it contains, and what can be done."""
    if not left_out:
        return "; it is empty"
    if ".tar" in left_out:
        return f"; its files: {left_out}; unpack it, and index the tars in it"
    return f"; its files: {left_out}; name the one that is the image by --image-key EXTENSION"


def _runs(tar: Path, name: str, form: SampleFormat, left_out: Tally) -> Iterator[list[_Member]]:
    """Yield the successive members of one key."""
    run: list[_Member] = []
    for member in _members(tar, name, form, left_out):
        if run and member.key != run[0].key:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _members(tar: Path, name: str, form: SampleFormat, left_out: Tally) -> Iterator[_Member]:
    """Yield every file that belongs to a sample, in order."""
    size, places, symbolic = tar.stat().st_size, {}, Tally()
    try:
        with tarfile.open(tar, mode="r:") as archive, tar.open("rb") as file:
            for member in archive:
                stop = archive.offset  # of the next header: a sparse member takes less than its size
                if stop > size:
                    raise ValueError(f"{name}: cut short inside {member.name!r} at byte {size}; copy or build it again")
                if member.isfile() or member.islnk():
                    place = _place(member, stop, places, name)
                    if parts := split_member(member.name):
                        link = Link(parts[1], *place) if member.islnk() else None
                        text = _text(archive, member, file, place) if parts[1] == form.label_member else None
                        yield _Member(*parts, member.offset, stop, text, link)
                    else:
                        left_out.count(why_no_member(member.name), member.name)
                elif member.issym() and split_member(member.name):
                    symbolic.count("symbolic", f"{member.name} to {member.linkname}")
                archive.members.clear()  # else tarfile keeps every header of the shard in memory
            _check_end(tar, name, archive.offset, size)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: {_no_tar(tar, name, error)}") from None
    for count, example in symbolic.values():
        raise ValueError(
            f"{name}: contains symbolic links where files should be: {count}, such as {example}; write it again with "
            "tar --dereference"
        )


def _place(member: tarfile.TarInfo, stop: int, places: dict[str, tuple[int, int]], name: str) -> tuple[int, int]:
    """Return offset and length of the member, or of the earlier one that it is a hard link to, and remember it."""
    place = (member.offset, stop - member.offset)
    if member.islnk():
        place = places.get(plain_key(member.linkname))
        if place is None:
            raise ValueError(
                f"{name}: {member.name} is a hard link to {member.linkname}, which is not before it in the tar; write "
                "it again with tar --hard-dereference"
            )
    places[plain_key(member.name)] = place
    return place


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, file: BinaryIO, place: tuple[int, int]) -> bytes:
    if member.isfile():
        return archive.extractfile(member).read()
    file.seek(place[0])
    return bytes(linked_bytes(file.read(place[1])))


def _no_tar(tar: Path, name: str, error: tarfile.TarError) -> str:
    """Return what is wrong with a file that tarfile refuses, and the fix."""
    with tar.open("rb") as file:
        start = file.read(8)
    if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None):
        return (
            f"is compressed ({kind}); samples are read at their place in a plain tar: unpack it, and index the result "
            f"(for gzip: gunzip < {name} > PLAIN.tar)"
        )
    return f"no readable tar ({error}); copy or build it again"


def _check_end(tar: Path, name: str, offset: int, size: int) -> None:
    """Check that the archive ends here: tarfile also stops, silently, at a bad header and at the end of the file."""
    with tar.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ValueError(f"{name}: cut short at byte {size}, before the end-of-archive mark; copy or build it again")
    if block.count(0) != BLOCK:
        raise ValueError(f"{name}: bad tar header at byte {offset}; copy or build it again")
    if (more := _next_header(tar, offset)) is not None:
        raise ValueError(
            f"{name}: another tar begins at byte {more}, behind the end-of-archive mark, where readers stop; join tars "
            "with tar --concatenate, not with cat"
        )


def _next_header(tar: Path, offset: int) -> int | None:
    """Return the place of the first tar header after the end-of-archive mark at `offset`; None without any."""
    with tar.open("rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            if block.count(0) != len(block):
                try:
                    tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    return None
                return file.tell() - BLOCK
    return None

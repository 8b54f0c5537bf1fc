"""Names of members of a tar, and the keys of samples in them.

The key is the name up to the first dot of the file, without a leading './'. webdataset, HF datasets and Energon keep
the './' that `tar -cf t.tar .` writes, so lists of keys may come with it or without: `plain_key` makes them one.
"""

from __future__ import annotations

import re

from dsmim.shards.extensions import is_image

# WebDataset's rule: the key ends at the first dot of the file's name and includes its folders.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
# webdataset's `skip_meta`: members below a top folder of such a name are not samples.
_META = re.compile(r"__[^/]*__($|/)")


def split_member(name: str) -> tuple[str, str] | None:
    """Split 'folder/000.jpg' into ('folder/000', 'jpg'); a leading './' is no part of the key. Return None for names
    that belong to no sample (no extension, hidden files, webdataset's `__…__` folders)."""
    plain = plain_key(name)
    match = None if _META.match(plain) else _MEMBER.fullmatch(plain)
    return (match[1], match[2].lower()) if match else None


def why_no_member(name: str) -> str:
    """Return why split_member gives None for a name."""
    plain = plain_key(name)
    if _META.match(plain):
        return "in __…__ folders"
    return "hidden" if plain.rpartition("/")[2].startswith(".") else "without extension"


def plain_key(text: str) -> str:
    """Return a key or a member's name without the leading './' of `tar -cf t.tar .`, which other tools keep."""
    return text.removeprefix("./")


def key_of(name: str) -> str:
    """Return the key that a line of a list or table means: a key, or a file's name, each with or without './'."""
    parts = split_member(name)
    return parts[0] if parts and is_image(parts[1]) else plain_key(name)

"""One image file of a build, as a folder or a table gives it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: whether a file is still the one that was packed."""


class ImageFile(NamedTuple):
    """One image on disk."""

    path: Path
    name: Path
    """Path that the sample's key is made of."""
    word: str | None
    """Name or number of its class, as the source writes it; None without labels."""
    stamp: Stamp
    row: int | None = None
    """Row of the table that lists it, from 1."""

    def __str__(self) -> str:
        return f"{self.path} (row {self.row})" if self.row else str(self.path)

    @property
    def key(self) -> str:
        """The key of its sample. In WebDataset a key ends at the first dot: other dots become '_'."""
        return str(self.name.with_suffix("")).replace(".", "_").lstrip("/")


def extension(path: Path | str) -> str:
    """Return the extension in lower case, without its dot."""
    return os.path.splitext(path)[1].lower().lstrip(".")  # noqa: PTH122 - a Path takes several times as long


def stamp_of(about: os.stat_result) -> Stamp:
    """Return size and time of a file."""
    return about.st_size, about.st_mtime_ns


def stamp_at(path: Path) -> Stamp | None:
    """Return size and time of the file at a path; None when there is no regular file."""
    try:
        about = path.stat()
    except OSError:
        return None
    return stamp_of(about) if stat.S_ISREG(about.st_mode) else None

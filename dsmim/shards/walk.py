"""Files on disk: what patterns match, and walks through folders of images (each folder once, also when symbolic links
lead to it again or in a circle)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from dsmim.shards.tally import Tally


def matching(pattern: str) -> list[str]:
    """Return the paths that a glob matches, sorted; ** means any number of folders.

    Its longest beginning that exists as it is written is taken literally, so that `my data [v2]/*.tar` is found.
    """
    if os.path.lexists(pattern):
        return [pattern]
    folder = os.path.dirname(pattern)  # noqa: PTH120 - a str keeps the path as it was given
    while folder and not os.path.isdir(folder):  # noqa: PTH112
        folder = os.path.dirname(folder)  # noqa: PTH120
    return sorted(glob.glob(glob.escape(folder) + pattern[len(folder) :], recursive=True))  # noqa: PTH207


def walk(root: Path, left_out: Tally) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, names of its folders, names of its files) as os.walk does, through symbolic links too.

    Links come last, so that a folder keeps its own path. What is removed from the names of folders is not visited. A
    folder that was visited under another path is counted in left_out. Raises OSError for a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    links = [root]
    while links:
        for top, folders, files in _new_folders(links.pop(0), seen, left_out):
            yield top, folders, files
            links += [top / name for name in sorted(folders) if (top / name).is_symlink()]
            folders[:] = sorted(name for name in folders if not (top / name).is_symlink())


def _new_folders(
    root: Path, seen: set[tuple[int, int]], left_out: Tally
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk through the folders that have not been seen yet, by device and inode."""
    for top, folders, files in os.walk(root, onerror=_fail):
        about = Path(top).stat()
        if (about.st_dev, about.st_ino) in seen:
            left_out.count("folders that are read under another path already", top)
            folders.clear()
        else:
            seen.add((about.st_dev, about.st_ino))
            yield Path(top), folders, files


def _fail(error: OSError) -> None:
    raise error

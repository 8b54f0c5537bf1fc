"""From the patterns that name shards to their paths and indexes; indexing of many shards.

dsmim/packing/writer.py writes shards, dsmim/packing/verify.py checks them.
"""

from __future__ import annotations

import glob
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from braceexpand import braceexpand

from dsmim.shards.atomic import remove_leftovers, write_atomically
from dsmim.shards.index import SUFFIX, ShardIndex, index_file, parse_page, read_index, write_index
from dsmim.shards.parallel import parallel
from dsmim.shards.remote import check, download, fetch_small, is_remote
from dsmim.shards.subset import apply_subset

OPENERS = 16  # threads that open sidecars, if opening one waits for a metadata server
PROBE = 100  # sidecars that are opened first, to measure whether it does
SLOW_OPEN = 3e-4  # seconds for one sidecar; if it takes less, threads would only wait for one another


def expand(patterns: str | list[str], what: str = "data", allow_pipe: bool = False) -> list[str]:
    """Return the shard paths of brace patterns and globs, those of one pattern sorted; a folder means the tars in it.
    URLs may have brace patterns only, which are expanded in webdataset's order.

    Raises ValueError, beginning with `what` and naming the pattern, when one of the expanded patterns matches nothing
    or a shard is named twice.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for text in braceexpand(pattern):
            found = _matches(text, what, allow_pipe)
            if not found:  # also for one missing in a range: training would continue with less data
                raise ValueError(f"{what}: no shards match {text!r}" + (f" of {pattern!r}" if text != pattern else ""))
            paths += found
    if not paths:
        raise ValueError(f"{what}: no shards given")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{what}: shard given twice: {twice}")
    return paths


def names_shards(text: str) -> bool:
    """Return whether a word of the command line means shards: a tar, a pattern of tars, a URL, or a folder of tars."""
    folder = Path(text)
    return is_remote(text) or text.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar")))


def open_shards(
    patterns: str | list[str],
    index_dir: str | None = None,
    what: str = "data",
    subset: str | None = None,
    allow_pipe: bool = False,
) -> list[ShardIndex]:
    """Return the indexes of all shards that the patterns name, in order; with `subset`, reduced to its samples.

    Raises ValueError for the first shard without a valid index.
    """
    paths = expand(patterns, what, allow_pipe)
    indexes = _read_indexes(paths, index_dir)
    return apply_subset(indexes, subset) if subset else indexes


def index_all(
    patterns: list[str], index_dir: str | None, workers: int, force: bool = False, allow_pipe: bool = False
) -> list[ShardIndex]:
    """Index every shard that has no valid index yet (with force, every shard). Raises ValueError that lists the bad
    shards, after the others are done."""
    shards = expand(patterns, allow_pipe=allow_pipe)
    for folder in {Path(index_dir)} if index_dir else {Path(tar).parent for tar in shards if not is_remote(tar)}:
        remove_leftovers(folder)
    return parallel(partial(_index_one, index_dir=index_dir, force=force), shards, workers, "index")


@contextmanager
def local_copy(tar: str) -> Iterator[Path]:
    """Yield a local file with the shard's bytes: the shard, or a download in a file without a name, which leaves
    nothing behind when this process is killed."""
    if not is_remote(tar):
        yield Path(tar)
        return
    with tempfile.TemporaryFile(prefix="dsmim-", suffix=".tar") as file:
        download(tar, file)
        file.seek(0)  # macOS: what opens /dev/fd/N begins where this descriptor is
        yield Path(f"{'/proc/self/fd' if sys.platform == 'linux' else '/dev/fd'}/{file.fileno()}")


def _read_indexes(paths: list[str], index_dir: str | None) -> list[ShardIndex]:
    begin = time.perf_counter()
    indexes = [read_index(path, index_dir) for path in paths[:PROBE]]
    if (time.perf_counter() - begin) / len(indexes) < SLOW_OPEN:
        return indexes + [read_index(path, index_dir) for path in paths[PROBE:]]
    with ThreadPoolExecutor(OPENERS) as pool:
        return indexes + list(pool.map(partial(read_index, index_dir=index_dir), paths[PROBE:]))


def _index_one(tar: str, index_dir: str | None, force: bool) -> ShardIndex:
    if not force:
        try:
            return read_index(tar, index_dir)
        except (ValueError, FileNotFoundError):
            index_file(tar, index_dir)  # raises what indexing cannot fix
        if is_remote(tar) and not tar.startswith("pipe:") and (published := _published(tar, index_dir)):
            return published
    with local_copy(tar) as copy:
        return write_index(tar, index_dir, copy)


def _published(tar: str, index_dir: str) -> ShardIndex | None:
    """Copy the sidecar beside a remote shard, if there is one: it saves reading the shard. The digest in it is compared
    with the shard's bytes when they are downloaded."""
    if "?" in tar:  # a signed address is valid for the shard only
        return None
    try:
        data = fetch_small(tar + SUFFIX)
    except ValueError:  # s3 answers 403 for missing objects; if more is wrong, reading the shard shows it
        return None
    path = index_file(tar, index_dir)
    try:  # a server may answer 200 with a page that says "not found"
        index = parse_page(data or b"", len(data or b""), tar, path, fix="")
    except ValueError:
        return None
    write_atomically(Path(path), data)
    return index


def _matches(pattern: str, what: str, allow_pipe: bool) -> list[str]:
    if is_remote(pattern):
        check(pattern, what, allow_pipe)
        if "*" in pattern and not pattern.startswith("pipe:"):
            raise ValueError(f"{what}: {pattern!r}: '*' cannot be expanded in a URL; write {{000000..000146}}")
        return [pattern]
    if os.path.isfile(pattern):  # noqa: PTH113 - Path objects would take most of the time of a large start
        return [pattern]
    if os.path.isdir(pattern):  # noqa: PTH112
        return sorted(str(path) for path in Path(pattern).glob("*.tar"))
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too

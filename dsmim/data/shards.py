"""Shards found, indexed and verified. Writing them is in shard_writer.py."""

from __future__ import annotations

import glob
import hashlib
from functools import partial
from pathlib import Path

from braceexpand import braceexpand

from dsmim.data.index import ShardIndex, index_file, is_image, parse_sample, read_index, write_index
from dsmim.data.parallel import parallel


def expand(patterns: str | list[str], what: str = "data") -> list[Path]:
    """Shard paths of brace patterns and globs, each pattern's sorted; folders stand for the tars in them.

    Raises ValueError, naming the pattern, when one matches nothing or a shard comes twice.
    """
    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [path for text in braceexpand(pattern) for path in _matches(text, what)]
        if not found:
            raise ValueError(f"{what}: no shards match {pattern!r}")
        paths += found
    twice = sorted({str(path) for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if twice:
        raise ValueError(f"{what}: shard given twice: {', '.join(twice)}")
    return paths


def open_shards(patterns: str | list[str], index_dir: str | None, what: str) -> list[ShardIndex]:
    """The indexes of all shards that the patterns name, in order."""
    return [read_index(path, index_dir) for path in expand(patterns, what)]


def index_all(patterns: list[str], index_dir: str | None, workers: int, force: bool = False) -> list[ShardIndex]:
    """Index every shard that has no valid index yet (all of them with force). Raises ValueError that lists the bad
    ones, after the others are done."""
    return parallel(partial(_index_one, index_dir=index_dir, force=force), expand(patterns), workers, "index")


def verify_all(patterns: list[str], index_dir: str | None, workers: int, decode_images: bool) -> list[str]:
    """One line per thing that is wrong, over all shards."""
    check = partial(verify, index_dir=index_dir, decode_images=decode_images)
    return [line for lines in parallel(check, expand(patterns), workers, "verify") for line in lines]


def verify(tar: Path, index_dir: str | None = None, decode_images: bool = False) -> list[str]:
    """What is wrong with one shard: tar structure, digest, index, and with decode_images every image."""
    try:
        index = read_index(tar, index_dir)
    except ValueError as error:
        return [str(error)]
    with tar.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != index.sha256:
            return [f"{tar}: contents differ from what was indexed ({index_file(tar, index_dir)})"]
        if not decode_images:
            return []
        return [line for record in index.records for line in _verify_sample(tar, file, record)]


def _verify_sample(tar: Path, file, record) -> list[str]:
    from dsmim.data.transforms import Undecodable, decode  # heavy, and needed only here

    file.seek(int(record[0]))
    key, members = parse_sample(file.read(int(record[1])))
    problems = []
    for extension, data in members.items():
        if is_image(extension):
            try:
                decode(data)
            except Undecodable as error:
                problems.append(f"{tar}: {key}.{extension} cannot be decoded: {error}")
    return problems


def _index_one(tar: Path, index_dir: str | None, force: bool) -> ShardIndex:
    if not force:
        try:
            return read_index(tar, index_dir)
        except ValueError:
            pass  # missing or stale, which is what indexing mends
    return write_index(tar, index_dir)


def _matches(pattern: str, what: str) -> list[Path]:
    if pattern.startswith("pipe:") or "://" in pattern:
        raise ValueError(f"{what}: {pattern!r} is no local path; copy the shards to a file system first")
    if Path(pattern).is_dir():
        return sorted(Path(pattern).glob("*.tar"))
    if Path(pattern).is_file():
        return [Path(pattern)]
    return sorted(Path(match) for match in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too

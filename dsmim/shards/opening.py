"""From the patterns that name shards to their paths and indexes; indexing of many shards.

dsmim/packing/writer.py writes shards, dsmim/packing/verify.py checks them.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from braceexpand import braceexpand

from dsmim.shards.atomic import remove_leftovers, write_atomically
from dsmim.shards.classes import CLASSES
from dsmim.shards.extensions import is_image
from dsmim.shards.index import (
    ShardIndex,
    describe_tar,
    parse_page,
    read_index,
    stored_format,
    write_sidecar,
)
from dsmim.shards.parallel import parallel
from dsmim.shards.remote import check, download, fetch_small, is_remote
from dsmim.shards.sample_format import DEFAULT, NO_LABEL, SampleFormat, number_names
from dsmim.shards.scan import Contents
from dsmim.shards.sidecar import SUFFIX, index_file
from dsmim.shards.subset import apply_subset
from dsmim.shards.walk import matching

OPENERS = 16  # threads that open sidecars, if opening one waits for a metadata server
PROBE = 100  # sidecars that are opened first, to measure whether it does
SLOW_OPEN = 3e-4  # seconds for one sidecar; if it takes less, threads would only wait for one another


def expand(patterns: str | list[str], what: str = "data", allow_pipe: bool = False) -> list[str]:
    """Return the shard paths of brace patterns and globs, those of one pattern sorted; a folder means the tars in it,
    and ~ the home folder. URLs may have brace patterns only, which are expanded in webdataset's order.

    Raises ValueError, beginning with `what` and naming the pattern, when one of the expanded patterns matches nothing
    or a shard is named twice.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for text in braceexpand(pattern):
            found = _matches(text, what, allow_pipe)
            if not found:  # also for one missing in a range: training would continue with less data
                raise ValueError(f"{what}: {_no_match(text, pattern)}")
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


@dataclass
class Indexed:
    """The indexes of shards, and what the tars that were read now contain beside samples."""

    shards: list[ShardIndex]
    found: Contents
    """Of all tars read now, without their samples."""
    classes: tuple[str, ...] = ()
    """Names of classes, if labels are names."""
    form: SampleFormat = DEFAULT
    """What was asked for."""

    def remarks(self) -> list[str]:
        """Return one line on each thing that a user should know."""
        found, lines = self.found, []
        if self.form.labels or self.form.classes:
            lines.append(self._labels())
        lines += found.left_out.line()
        if found.several:
            lines.append(
                f"samples with several images, of which one is taken: {found.several}; choose another by --image-key "
                "EXTENSION"
            )
        if found.unread:
            lines.append(f"labels that are no class number: {found.unread}; names are numbered by --labels cls")
        return lines

    def _labels(self) -> str:
        missing = sum(int((index.labels() == NO_LABEL).sum()) for index in self.shards)
        labelled, highest = sum(index.samples for index in self.shards) - missing, max(i.highest for i in self.shards)
        if not labelled:
            key = self.shards[0].table().keys[0]
            return f"warning: none of the {missing} samples, such as {key}, has a label by --labels {self.form.labels}"
        names = f"; {len(self.classes)} class names, in {CLASSES} or --classes" if self.classes else ""
        return f"{labelled} samples with a class number (0 to {highest}), {missing} without{names}"


def index_all(
    patterns: list[str],
    index_dir: str | None,
    workers: int,
    force: bool = False,
    allow_pipe: bool = False,
    form: SampleFormat = DEFAULT,
) -> Indexed:
    """Index every shard that has no valid index of this format yet (with force, every shard).

    Names of classes are numbered over all shards, unless the format lists them. Raises ValueError that lists the bad
    shards, after the others are done.
    """
    shards = expand(patterns, allow_pipe=allow_pipe)
    folders = [Path(index_dir)] if index_dir else sorted({Path(tar).parent for tar in shards if not is_remote(tar)})
    for folder in folders:
        remove_leftovers(folder)
    work = partial(_index_one, index_dir=index_dir, force=force, form=form)
    done = parallel(work, shards, workers, "index")
    found = _joined([contents for _, contents in done])
    if named := [tar for tar, (_, contents) in zip(shards, done, strict=True) if contents.words]:
        form = replace(form, classes=number_names(found.words, found.numbered, folders))
        again = partial(_index_one, index_dir=index_dir, force=True, form=form)
        numbered = dict(zip(named, parallel(again, named, workers, "index"), strict=True))
        done = [numbered.get(tar, before) for tar, before in zip(shards, done, strict=True)]
    return Indexed([index for index, _ in done], found, form.classes or (), form)


def _joined(parts: list[Contents]) -> Contents:
    whole = Contents()
    for part in parts:
        whole.add(part)
    return whole


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


def _index_one(tar: str, index_dir: str | None, force: bool, form: SampleFormat) -> tuple[ShardIndex | None, Contents]:
    """Return the index of a tar, and what the tar contains beside samples (nothing if it was not read).

    When its labels are names without numbers, no index is written, and None returned.
    """
    asked = form.stored().items()
    if not force and (not asked or asked <= stored_format(tar, index_dir).items()):
        with suppress(ValueError, FileNotFoundError):
            return read_index(tar, index_dir), Contents()
    form = form.or_else(stored_format(tar, index_dir))
    if is_remote(tar) and not force and form == DEFAULT and (published := _published(tar, index_dir)):
        return published, Contents()
    with local_copy(tar) as copy:
        described = describe_tar(copy, tar, form)
    contents = replace(described.contents, samples=[])
    if contents.words:
        return None, contents
    return write_sidecar(tar, index_file(tar, index_dir), *described), contents


def _published(tar: str, index_dir: str) -> ShardIndex | None:
    """Copy the sidecar beside a remote shard, if there is one: it saves reading the shard. The digest in it is compared
    with the shard's bytes when they are downloaded."""
    if "?" in tar or tar.startswith("pipe:"):  # a signed address is valid for the shard only
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


def _no_match(text: str, pattern: str) -> str:
    """Return what is wrong with a pattern that names no shard, and the fix."""
    of = f" of {pattern!r}" if text != pattern else ""
    if os.path.isdir(text):  # noqa: PTH112
        images = any(is_image(name.rpartition(".")[2].lower()) for _, _, names in os.walk(text) for name in names)
        why = "of images: make shards of it first" if images else "without .tar files; to make shards of images"
        return f"no shards match {text!r}{of}: it is a folder {why}, run: dsmim shards build {shlex.quote(text)} SHARDS"
    folder, name = os.path.split(text)
    if any(mark in (name if os.path.isdir(folder) else pattern) for mark in ("::", ",", " ")):  # noqa: PTH112
        hint = "; several patterns are a list: data.train='[a-{0..3}.tar, b.tar]', or separate words of a command"
    elif is_image(text.rpartition(".")[2].lower()) or text.endswith((".csv", ".tsv")):
        hint = "; to make shards of images, run: dsmim shards build SOURCE SHARDS"
    else:
        hint = "; give tars, a folder of tars, or a pattern in quotes"
    return f"no shards match {text!r}{of} (looked in {Path(text).absolute().parent}){hint}"


def _matches(pattern: str, what: str, allow_pipe: bool) -> list[str]:
    if is_remote(pattern):
        check(pattern, what, allow_pipe)
        if "*" in pattern and not pattern.startswith("pipe:"):
            raise ValueError(f"{what}: {pattern!r}: '*' cannot be expanded in a URL; write {{000000..000146}}")
        return [pattern]
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - as below
    if os.path.isfile(pattern):  # noqa: PTH113 - Path objects would take most of the time of a large start
        return [pattern]
    if os.path.isdir(pattern):  # noqa: PTH112
        return sorted(str(path) for path in Path(pattern).glob("*.tar"))
    return matching(pattern)

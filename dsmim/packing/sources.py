"""Where the images of a build come from: a folder, a table of path,label, or other tars; filters and splits."""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dsmim.data.order import permutation
from dsmim.log import NAMED, some
from dsmim.packing.classes import LARGEST, is_number, number_classes, whole_number
from dsmim.packing.files import ImageFile, Stamp, extension, stamp_of
from dsmim.packing.folders import doubts, read_folder
from dsmim.packing.tables import read_table
from dsmim.shards.extensions import LOOKED_FOR
from dsmim.shards.opening import names_shards, open_shards
from dsmim.shards.remote import is_remote
from dsmim.shards.sample_format import NO_LABEL
from dsmim.shards.tally import Tally
from dsmim.shards.tar import Link, read_sample


@dataclass(frozen=True)
class FileSource:
    """One image on disk."""

    path: Path
    key: str
    label: int | None = None
    stamp: Stamp | None = field(default=None, repr=False)
    """Size and time of the file when the build began."""

    def members(self) -> dict[str, bytes]:
        """Return extension → bytes. Raises ValueError when the file cannot be read, or has changed."""
        try:
            with self.path.open("rb") as file:
                stamp, data = stamp_of(os.fstat(file.fileno())), file.read()
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}") from None
        if self.stamp and stamp != self.stamp:
            raise ValueError(f"{self.path}: has changed since the build began; run the same command again")
        image = {extension(self.path): data}
        return image if self.label is None else image | {"cls": str(self.label).encode()}


@dataclass(frozen=True)
class TarSource:
    """One sample of another tar, with all its members."""

    tar: str
    key: str
    offset: int
    length: int
    links: tuple[Link, ...] = field(default=(), repr=False)
    label: int | None = field(default=None, repr=False)
    stamp: str = field(default="", repr=False)
    """Digest of the tar."""

    def members(self) -> dict[str, bytes]:
        """Return extension → bytes, with the index's class number as cls wherever it comes from. Raises ValueError when
        the tar has changed since it was indexed."""
        with Path(self.tar).open("rb") as file:
            key, members = read_sample(file, self.offset, self.length, self.links)
        if key != self.key:
            fix = f"run: dsmim shards index --force {shlex.quote(self.tar)}"
            raise ValueError(f"{self.tar}: has changed since it was indexed; {fix}")
        found = {extension: bytes(data) for extension, data in members.items()}
        stored = found.get("cls", b"").strip()
        if self.label is not None and not (stored.isdigit() and int(stored) == self.label):
            found["cls"] = str(self.label).encode()
        return found


Source = FileSource | TarSource


class Found(NamedTuple):
    """What a source contains."""

    sources: list[Source]
    classes: list[str]
    """Names of the classes, in the order of their numbers; none when labels are numbers, or there are none."""
    left_out: Tally
    """Files that are not in the shards, by extension or reason."""
    warnings: list[str]


def read_sources(
    source: str,
    root: Path | None = None,
    index_dir: str | None = None,
    known: Path | None = None,
    numeric: str | None = None,
) -> Found:
    """Return the images of a folder, of a table or of tars, and the class names when labels are names.

    In a folder of folders, the first level gives the classes (folders.py); a flat folder has no labels. A table has a
    column of paths and, for labels, one of numbers or names (tables.py). Its paths are relative to `root`, by default
    the folder of the table. Tars (a path, glob, brace pattern, or a folder of them) must be indexed; their samples keep
    all their members. known, numeric: how names become class numbers (classes.py). Raises ValueError naming what is
    wrong.
    """
    source = os.path.expanduser(source)  # noqa: PTH111 - a pattern is no Path, and ~name may be a file
    if names_shards(source):
        if known or numeric:
            raise ValueError("--classes and --numeric-classes have no effect on tars, whose samples keep their labels")
        found = _from_tars(source, index_dir)
    elif Path(source).is_dir():
        found = _from_folder(Path(source), known, numeric)
    elif Path(source).exists():
        found = _from_table(Path(source), root or Path(source).parent, known, numeric)
    else:
        raise ValueError(
            f"{source}: no such file or folder (looked in {Path.cwd()}); give a folder of images or of class folders, "
            "a table (path,label), or tars: 'shards/*.tar' in quotes"
        )
    if not found.sources:
        raise ValueError("; ".join([f"{source}: no images found ({LOOKED_FOR})", *found.left_out.line()]))
    if (known or numeric) and not count_labels(found.sources):
        raise ValueError(
            f"--classes and --numeric-classes have no effect: {source} has neither class folders nor labels"
        )
    _refuse_shared_keys(source, found.sources)
    return found


def count_labels(sources: Iterable[Source]) -> Counter[int]:
    """Return class number → number of sources that have it."""
    return Counter(source.label for source in sources if source.label is not None)


def filter_sources(sources: list[Source], keys: Iterable[str] | None, without: Iterable[str] | None) -> list[Source]:
    """Return the sources whose keys are in `keys` (None: all) and not in `without`.

    Raises ValueError when a key of `keys` is in no source, or no source is left.
    """
    kept = sources
    if keys is not None:
        wanted = set(keys)
        kept = [source for source in kept if source.key in wanted]
        if missing := sorted(wanted - {source.key for source in kept})[:3]:
            raise ValueError(f"--keys: {len(wanted) - len(kept)} keys are not in the source, such as {missing}")
    dropped = set(without or ())
    kept = [source for source in kept if source.key not in dropped]
    if not kept:
        raise ValueError("--keys and --without leave no image")
    return kept


def split_sources(sources: list[Source], splits: dict[str, float], seed: int | None) -> dict[str, list[Source]]:
    """Shuffle n sources (unless the seed is None) and split them. Part k ends at floor(n × the sum of shares 0 to k).

    Without splits there is one part, "data". Raises ValueError when the shares add up to more than 1 or a part is
    empty.
    """
    if sum(splits.values()) > 1 + 1e-9:
        raise ValueError(f"--split: the shares add up to {sum(splits.values()):g}, more than 1")
    mixed = sources if seed is None else [sources[i] for i in permutation(len(sources), seed, "build")]
    parts, begin, reached = {}, 0, 0.0
    for name, share in (splits or {"data": 1.0}).items():
        reached += share
        end = int(len(mixed) * reached + 1e-9)
        if begin == end:
            raise ValueError(f"--split: {name}={share:g} of {len(mixed)} images is none")
        parts[name], begin = mixed[begin:end], end
    return parts


def _name(source: Source) -> str:
    return str(source.path) if isinstance(source, FileSource) else f"a sample of {source.tar}"


def _refuse_shared_keys(where: str, sources: list[Source]) -> None:
    if len({source.key for source in sources}) == len(sources):  # there may be many millions
        return
    of_key: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        of_key[source.key].append(source)
    shared = {key: same for key, same in of_key.items() if len(same) > 1}
    words = [f"{key!r} ({', '.join(map(_name, same[:NAMED]))})" for key, same in shared.items()]
    raise ValueError(
        f"{where}: {len(shared)} keys would be shared by several images: {some(words, len(words))}; a key is the path "
        "without the extension, with '_' for other dots: rename or remove images so that keys differ"
    )


def _from_tars(source: str, index_dir: str | None) -> Found:
    if is_remote(source):
        raise ValueError(f"{source}: shards are built from local tars; copy them to a file system first")
    sources: list[Source] = []
    for index in open_shards(source, index_dir, str(source)):
        table = index.table()
        labels = [None if label == NO_LABEL else label for label in table.labels.tolist()]
        sources += [
            TarSource(index.tar, key, *table.whole(row), labels[row], index.sha256)
            for row, key in enumerate(table.keys)
        ]
    return Found(sources, [], _beside_tars(Path(source)), [])


def _beside_tars(folder: Path) -> Tally:
    """Count what a folder of tars contains besides them and what the shards commands write."""
    left_out = Tally()
    ours = (".tar", ".dsmi", ".build.json", "classes.json")
    for path in sorted(folder.iterdir()) if os.path.isdir(folder) else []:  # noqa: PTH112 - a pattern may be too long
        if not path.name.endswith(ours) and not path.name.startswith("."):
            kind = "folders beside the tars" if path.is_dir() else f".{extension(path)}"
            left_out.count(kind, str(path))
    return left_out


def _from_folder(path: Path, known: Path | None, numeric: str | None) -> Found:
    folder = read_folder(path)
    classes = number_classes(folder.classes, str(path), known, numeric) if folder.classes else []
    return Found(_sources(folder.files, classes), classes, folder.left_out, doubts(folder))


def _from_table(path: Path, root: Path, known: Path | None, numeric: str | None) -> Found:
    table = read_table(path, root)
    words = {file.word for file in table.files} - {None}
    if not known:
        _refuse_mixed(path, table.files)
        if (
            words
            and all(map(is_number if numeric == "number" else str.isdecimal, words))
            and numeric in (None, "number")
        ):
            _refuse_unfit(path, words)
            return Found(_sources(table.files), [], Tally(), table.notes)
    classes = number_classes(words, str(path), known, numeric) if words else []
    return Found(_sources(table.files, classes), classes, Tally(), table.notes)


def _sources(files: list[ImageFile], classes: Iterable[str] = ()) -> list[Source]:
    """Return the sources of files; without classes, their words are numbers."""
    numbers = {name: number for number, name in enumerate(classes)}
    words = {file.word for file in files} - {None}
    labels = {word: numbers[word] if numbers else whole_number(word) for word in words}
    return [FileSource(file.path, file.key, labels.get(file.word), file.stamp) for file in files]


def _refuse_unfit(table: Path, words: set[str]) -> None:
    if unfit := sorted(word for word in words if whole_number(word) is None):
        raise ValueError(
            f"{table}: class numbers that are not whole, or above {LARGEST}: {some(unfit, len(unfit))}; number the "
            "classes from 0, or see --numeric-classes"
        )


def _refuse_mixed(table: Path, files: list[ImageFile]) -> None:
    """Refuse names among numbers: one of the two is a mistake."""
    labelled = [file for file in files if file.word is not None]
    if not labelled:
        return
    first = labelled[0]
    odd = [file for file in labelled if is_number(file.word) != is_number(first.word)]
    what = "a number" if is_number(first.word) else "a name"
    if odd:
        words = [f"row {file.row} has the label {file.word!r}" for file in odd]
        raise ValueError(f"{table}: {some(words, len(words))}, where the first one, {first.word!r}, is {what}")

"""Where the images of a build come from: a folder, a table of path,label, or other tars; filters and splits."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsmim.data.order import permutation
from dsmim.shards.extensions import is_image
from dsmim.shards.opening import open_shards
from dsmim.shards.remote import is_remote
from dsmim.shards.tar import Link, read_sample


@dataclass(frozen=True)
class FileSource:
    """One image on disk."""

    path: Path
    key: str
    label: int | None = None

    def members(self) -> dict[str, bytes]:
        """Return extension → bytes. Raises ValueError when the file cannot be read."""
        try:
            image = {self.path.suffix.lower().lstrip("."): self.path.read_bytes()}
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}") from None
        return image if self.label is None else image | {"cls": str(self.label).encode()}


@dataclass(frozen=True)
class TarSource:
    """One sample of another tar, with all its members."""

    tar: str
    key: str
    offset: int
    length: int
    links: tuple[Link, ...] = field(default=(), repr=False)

    def members(self) -> dict[str, bytes]:
        """Return extension → bytes. Raises ValueError when the tar has changed since it was indexed."""
        with Path(self.tar).open("rb") as file:
            key, members = read_sample(file, self.offset, self.length, self.links)
        if key != self.key:
            fix = f"run: dsmim shards index --force {shlex.quote(self.tar)}"
            raise ValueError(f"{self.tar}: has changed since it was indexed; {fix}")
        return {extension: bytes(data) for extension, data in members.items()}


Source = FileSource | TarSource


def read_sources(source: str, root: Path | None = None, index_dir: str | None = None) -> tuple[list[Source], list[str]]:
    """Return the images of a folder, of a CSV/TSV table or of tars, and the class names when labels are names.

    In a folder of folders, the first level gives the classes, numbered in the order of their names; a flat folder has
    no labels. A table has the column path and, for labels, the column label: numbers or names. Paths are relative to
    `root`, by default the folder of the table. Tars (a path, glob, brace pattern, or a folder of them) must be
    indexed; their samples keep all their members. Raises ValueError naming what is wrong.
    """
    if _is_tars(source):
        sources, classes = _from_tars(source, index_dir), []
    elif Path(source).is_dir():
        sources, classes = _from_folder(Path(source))
    else:
        sources, classes = _from_table(Path(source), root or Path(source).parent)
    if not sources:
        raise ValueError(f"{source}: no images found")
    keys: dict[str, Source] = {}
    for item in sources:
        if item.key in keys:
            raise ValueError(f"{_name(item)} and {_name(keys[item.key])} would share the key {item.key!r}; rename one")
        keys[item.key] = item
    return sources, classes


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


def _is_tars(source: str) -> bool:
    folder = Path(source)
    return is_remote(source) or source.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar")))


def _name(source: Source) -> str:
    return str(source.path) if isinstance(source, FileSource) else f"a sample of {source.tar}"


def _from_tars(source: str, index_dir: str | None) -> list[Source]:
    if is_remote(source):
        raise ValueError(f"{source}: shards are built from local tars; copy them to a file system first")
    sources: list[Source] = []
    for index in open_shards(source, index_dir, str(source)):
        table = index.table()
        sources += [TarSource(index.tar, key, *table.whole(row)) for row, key in enumerate(table.keys)]
    return sources


def _key(relative: Path) -> str:
    """Return the path without its extension. In WebDataset a key ends at the first dot: other dots become '_'."""
    return str(relative.with_suffix("")).replace(".", "_")


def _from_folder(folder: Path) -> tuple[list[Source], list[str]]:
    files = (Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(path for path in files if is_image(path.suffix.lower().lstrip(".")) and path.is_file())
    relatives = [path.relative_to(folder) for path in paths]
    top = {len(relative.parts) == 1 for relative in relatives}
    if top == {True, False}:
        raise ValueError(f"{folder}: contains images beside class folders; move them into one, or give a table")
    classes = sorted({relative.parts[0] for relative in relatives}) if top == {False} else []
    labels = {name: number for number, name in enumerate(classes)}
    sources = [
        FileSource(path, _key(rel), labels.get(rel.parts[0])) for path, rel in zip(paths, relatives, strict=True)
    ]
    return sources, classes


def _from_table(table: Path, root: Path) -> tuple[list[Source], list[str]]:
    try:
        text = table.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: is neither a folder nor a readable table ({error})") from None
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t" if table.suffix == ".tsv" else ",") if row]
    rows = rows[1:] if rows and rows[0][0] == "path" else rows  # the heading line is optional
    widths = {len(row) for row in rows}
    if not widths <= {1} and not widths <= {2}:
        number = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]) or len(row) > 2)
        raise ValueError(f"{table}: row {number + 1} ({rows[number]}) should have the columns path or path,label")
    words = [row[1].strip() for row in rows if len(row) == 2]
    numeric = bool(words) and words[0].isdigit()
    if odd := [number for number, word in enumerate(words) if not word or word.isdigit() != numeric]:
        what = "a number from 0" if numeric else "a name"
        raise ValueError(f"{table}: row {odd[0] + 1} has the label {words[odd[0]]!r} where the first one is {what}")
    classes = [] if numeric else sorted(set(words))
    labels = {word: int(word) if numeric else classes.index(word) for word in set(words)}
    sources = [FileSource(root / row[0], _key(Path(row[0])), labels[row[1].strip()] if words else None) for row in rows]
    return [_checked(source, table) for source in sources], classes


def _checked(source: FileSource, table: Path) -> FileSource:
    if not source.path.is_file():
        raise ValueError(f"{table}: no such file: {source.path}")
    if not is_image(source.path.suffix.lower().lstrip(".")):
        raise ValueError(f"{table}: {source.path} has no image extension")
    return replace(source, key=source.key.lstrip("/"))

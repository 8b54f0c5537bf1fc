"""A table of images and their labels: which separator and which columns it has, and its rows."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from dsmim.log import NAMED, some
from dsmim.packing.files import ImageFile, extension, stamp_at
from dsmim.shards.extensions import is_image

SEPARATORS = (",", "\t", ";")
PROBE = 1000
"""How many rows decide which separator a table has."""
_PATHS = {"path", "file", "filename", "filepath", "image", "img", "imagepath", "imgpath", "imagefile", "imagename"}
_LABELS = {"label", "labels", "class", "classes", "classname", "category", "target", "labelid", "classid"}
_LABELS |= {"categoryid", "classindex", "classidx", "classnumber", "labelname", "categoryname"}
_ONE_COLUMN = "write paths alone, or path,label separated by a comma, a tab or a semicolon"


@dataclass
class Table:
    """The images that a table lists."""

    path: Path
    files: list[ImageFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Warnings: columns that are not used."""


class _Row(NamedTuple):
    number: int
    cells: list[str]


class _Columns(NamedTuple):
    path: int
    label: int | None
    heading: bool
    """Whether the first row names the columns."""


def read_table(path: Path, root: Path) -> Table:
    """Return the rows of a table, whose paths start from `root`, unless they are absolute or begin with ~.

    The separator is a comma, a tab or a semicolon, whichever divides every row alike. Headings such as path,label or
    Image;Class name the columns; without them the first column that holds names of images is the path.
    Raises ValueError that says what was seen, and lists the rows of the first kind of fault.
    """
    rows = _rows(path, root)
    if not rows:
        raise ValueError(f"{path}: no images found: the table is empty")
    table = Table(path)
    columns = _columns(path, rows)
    if unused := [text for i, text in enumerate(rows[0].cells) if i not in (columns.path, columns.label)]:
        table.notes.append(f"{path}: these columns are not used: {', '.join(map(repr, unused))}")
    rows = rows[1:] if columns.heading else rows
    words = [None if columns.label is None else row.cells[columns.label] for row in rows]
    if words and columns.label is not None and not any(words):
        table.notes.append(f"{path}: the column of labels is empty, so the samples have no labels")
        words = [None] * len(rows)
    table.files = _files(path, rows, words, columns, root)
    return table


def _rows(path: Path, root: Path) -> list[_Row]:
    """Read the table with the separator that divides it."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is neither a folder, nor a tar, nor a readable table ({error})") from None
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    begins = {separator: _split(text, separator, PROBE) for separator in [usual, *SEPARATORS]}
    even = [s for s, rows in begins.items() if len({len(row.cells) for row in rows}) == 1 < len(rows[0].cells)]
    sure = [separator for separator in even if _named(begins[separator]) or _exists(begins[separator], root)]
    rows = _split(text, (sure or even or [usual])[0])
    widths = {len(row.cells) for row in rows}
    if len(widths) > 1:
        odd = [row for row in rows if len(row.cells) != len(rows[0].cells)]
        raise ValueError(
            f"{path}: {_seen(rows)}, but other rows have another number of columns: {_list(odd)}; write path,label in "
            "every row, separated by commas, tabs or semicolons, and put names that contain them in quotes"
        )
    return rows


def _split(text: str, separator: str, rows: int | None = None) -> list[_Row]:
    """Return the rows, or the first ones; empty rows are left out."""
    reader = islice(csv.reader(io.StringIO(text), delimiter=separator), rows)
    return [_Row(number, [cell.strip() for cell in cells]) for number, cells in enumerate(reader, 1) if cells]


def _named(rows: list[_Row]) -> bool:
    return any(_plain(cell) in _PATHS for cell in rows[0].cells)


def _exists(rows: list[_Row], root: Path) -> bool:
    return any((root / os.path.expanduser(cell)).is_file() for cell in rows[0].cells if cell)  # noqa: PTH111 - see _path


def _plain(heading: str) -> str:
    """Return a heading without what differs between programs: File_Name and file name become filename."""
    return "".join(letter for letter in heading.lower() if letter.isalnum())


def _columns(path: Path, rows: list[_Row]) -> _Columns:
    """Return which columns are which."""
    first = rows[0].cells
    images = [i for i, cell in enumerate(first) if is_image(extension(cell))]
    if images:
        if len(first) > 2:
            raise ValueError(f"{path}: {_seen(rows)}; add a first row that names the columns path and label")
        return _Columns(images[0], 1 - images[0] if len(first) == 2 else None, heading=False)
    paths, labels = ([i for i, cell in enumerate(first) if _plain(cell) in known] for known in (_PATHS, _LABELS))
    if len(paths) == 1 and not labels and len(first) == 2:
        labels = [1 - paths[0]]
    if len(paths) == 1 and (len(labels) == 1 or len(first) == 1):
        return _Columns(paths[0], labels[0] if labels else None, heading=True)
    fix = "call the columns to use path and label, or remove the others" if len(first) > 1 else _ONE_COLUMN
    raise ValueError(f"{path}: {_seen(rows)}; {fix}")


def _files(table: Path, rows: list[_Row], words: list[str | None], columns: _Columns, root: Path) -> list[ImageFile]:
    """Return the files of all rows. Raises ValueError with all rows of the first kind of fault that there is."""
    names = [_path(row.cells[columns.path]) for row in rows]
    _refuse(table, rows, [word == "" for word in words], "no label", "give one, or remove the row")
    odd = [not is_image(extension(name)) for name in names]
    _refuse(
        table, rows, odd, "no image's extension in the path", _hint(root, names[odd.index(True)]) if any(odd) else ""
    )
    stamps = [stamp_at(root / name) for name in names]
    _refuse(table, rows, [not stamp for stamp in stamps], "no such file", f"paths start from {root}; see --root")
    files = [
        ImageFile(root / name, name, word, stamp, row.number)
        for name, word, stamp, row in zip(names, words, stamps, rows, strict=True)
    ]
    _refuse_repeated(table, files)
    return files


def _path(cell: str) -> Path:
    return Path(os.path.expanduser(cell))  # noqa: PTH111 - Path's own raises for ~name without such a user


def _hint(root: Path, name: Path) -> str:
    folder = (root / name).parent
    there = sorted(folder.glob(f"{name.name}.*")) if name.name and folder.is_dir() else []
    there = [path for path in there if is_image(extension(path))]
    return f"write it: {there[0].name} is there" if there else "is this the column of paths?"


def _refuse(table: Path, rows: list[_Row], faulty: Iterable[bool], what: str, fix: str) -> None:
    if bad := [row for row, fault in zip(rows, faulty, strict=True) if fault]:
        raise ValueError(f"{table}: {what} in {len(bad)} of {len(rows)} rows: {_list(bad)}; {fix}")


def _refuse_repeated(table: Path, files: list[ImageFile]) -> None:
    """Refuse rows that list the same file: one sample has one label, and is seen once in an epoch."""
    if len({file.path for file in files}) == len(files):
        return
    of_path: dict[Path, list[ImageFile]] = defaultdict(list)
    for file in files:
        of_path[file.path].append(file)
    repeated = [same for same in of_path.values() if len(same) > 1]
    words = [f"{same[0].name} in rows {', '.join(str(file.row) for file in same[:NAMED])}" for same in repeated]
    raise ValueError(
        f"{table}: lists {len(repeated)} images more than once: {some(words, len(words))}; keep one row for each"
    )


def _list(rows: list[_Row]) -> str:
    return some((f"row {row.number} ({', '.join(row.cells)})" for row in rows), len(rows))


def _seen(rows: list[_Row]) -> str:
    """Return what the first row looks like."""
    first = rows[0]
    return f"row {first.number} has {len(first.cells)} columns: {', '.join(map(repr, first.cells))}"

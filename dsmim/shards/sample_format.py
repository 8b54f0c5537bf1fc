"""What the members of a foreign tar mean: which one is the image, and where a sample's class number comes from.

A label is the text of a member (`cls`), a field of a JSON member (`json:label`), the name of the folder in the key
(`folder`), or a row of a table beside the tars (`labels.csv`). Names are numbered by a list of class names.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsmim.shards.classes import CLASSES, read_names, write_classes
from dsmim.shards.extensions import IMAGE_EXTENSIONS
from dsmim.shards.names import key_of

NO_LABEL = -1
TABLES = {".csv": ",", ".tsv": "\t"}
# Programs that hold class numbers in a column of floats write 3.0.
_NUMBER = re.compile(r"([0-9]{1,9})(\.0+)?")
_HEADINGS = ("key", "path", "file", "filename", "image")


@dataclass(frozen=True)
class SampleFormat:
    """How a tar's samples are read. The default is a known image extension, and a number in KEY.cls."""

    labels: str | None = None
    """cls or another extension, json:FIELD, folder, or a table's path; None: KEY.cls, whose words are not numbered."""
    image_key: str | None = None
    """Extension of the image; None: the first of IMAGE_EXTENSIONS that a sample has."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers."""

    def image_of(self, extensions: Iterable[str]) -> str | None:
        """Return the extension of a sample's image; None when it has none."""
        wanted = (self.image_key,) if self.image_key else IMAGE_EXTENSIONS
        return next((extension for extension in wanted if extension in extensions), None)

    @property
    def label_member(self) -> str | None:
        """The extension of the member that holds the label; None when no member does."""
        spec = self.labels or "cls"
        return None if spec == "folder" or is_table(spec) else spec.partition(":")[0]

    def label(self, key: str, text: bytes | None) -> int | str:
        """Return the class number of a sample, NO_LABEL, or a name that has no number yet.

        text: the label's member. Raises ValueError, beginning with the member, when it cannot be read.
        """
        value = self._value(key, text)
        if self.classes is not None and value in (numbers := _numbers(self.classes)):
            return numbers[value]
        if match := _NUMBER.fullmatch(value):
            return self._checked(key, int(match[1]))
        if self.labels is None or not value:
            return NO_LABEL
        if self.classes is not None:
            raise ValueError(f"{key}: the class {value[:40]!r} is not among the {len(self.classes)} of --classes")
        return _checked_name(key, value)

    def stored(self) -> dict[str, Any]:
        """Return what an index keeps of this format."""
        table = _table_digest(*_stamp(self.labels)) if self.labels and is_table(self.labels) else None
        names = None if self.classes is None else _digest("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        about = {"labels": self.labels, "image_key": self.image_key, "table": table, "classes": names}
        return {name: value for name, value in about.items() if value is not None}

    def or_else(self, stored: dict[str, Any]) -> SampleFormat:
        """Return this format; what it leaves open is as in an index (`stored`)."""
        labels = self.labels or stored.get("labels") or ("cls" if self.classes else None)
        return SampleFormat(labels, self.image_key or stored.get("image_key"), self.classes)

    def _value(self, key: str, text: bytes | None) -> str:
        spec = self.labels or "cls"
        if spec == "folder":
            return key.rpartition("/")[0].rpartition("/")[2]
        if is_table(spec):
            return _table(*_stamp(spec)).get(key, "")
        extension, _, field = spec.partition(":")
        if text is None:
            return ""
        return _field(f"{key}.{extension}", text, field) if field else text.decode("utf-8", "replace").strip()

    def _checked(self, key: str, number: int) -> int:
        if self.classes is not None and number >= len(self.classes):
            raise ValueError(f"{key}: the class number {number} is not below the {len(self.classes)} of --classes")
        return number


DEFAULT = SampleFormat()


def number_names(words: set[str], numbers: int, folders: Iterable[Path]) -> tuple[str, ...]:
    """Return the classes of words found in tars: those of the folders' classes.json, or else the sorted words, which
    are then written to it.

    numbers: how many labels are numbers. Raises ValueError when there are such too, or a classes.json does not list all
    the words.
    """
    if numbers:
        raise ValueError(
            f"{numbers} labels are numbers and others are names, such as {min(words)!r}; give all names by --classes"
        )
    files = [folder / CLASSES for folder in folders]
    for file in (file for file in files if file.exists()):
        classes = read_names(file)
        if missing := sorted(words - set(classes)):
            raise ValueError(
                f"{file}: does not list {len(missing)} of the classes, such as {missing[0]!r}; remove it and index all "
                "shards again with --force, or give a list by --classes"
            )
        return classes
    for file in files:
        write_classes(file, sorted(words))
    return tuple(sorted(words))


def is_table(spec: str) -> bool:
    """Return whether a specification of labels names a table."""
    return Path(spec).suffix.lower() in TABLES


def checked_spec(spec: str) -> str:
    """Return a specification of labels. Raises ValueError when it is none, or its table cannot be used."""
    if is_table(spec):
        _table(*_stamp(spec))
    elif not re.fullmatch(r"[^/:\s]+|json:\S+", spec):
        raise ValueError(
            f"--labels {spec}: give cls (or another extension), json:FIELD, folder, or a .csv or .tsv file"
        )
    return spec.lstrip(".")


@lru_cache(maxsize=4)
def _numbers(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def _stamp(path: str) -> tuple[str, int, int]:
    """Return path, size and time of a table. Raises ValueError when there is none."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ValueError(f"--labels {path}: cannot be read ({error.strerror})") from None
    return path, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=2)
def _table_digest(path: str, size: int, time: int) -> str:
    return _digest(Path(path).read_bytes())


@lru_cache(maxsize=2)
def _table(path: str, size: int, time: int) -> dict[str, str]:
    """Return key → label of a table with two columns and, if it has one, a heading."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter=TABLES[Path(path).suffix.lower()]) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--labels {path}: cannot be read ({error})") from None
    rows = rows[1:] if rows and rows[0][0].strip().lower() in _HEADINGS else rows
    if odd := next((row for row in rows if len(row) != 2), None):
        raise ValueError(f"--labels {path}: the row {odd} should have two columns: key,label")
    labels: dict[str, str] = {}
    for name, value in rows:
        key = key_of(name)
        if labels.setdefault(key, value.strip()) != value.strip():
            raise ValueError(f"--labels {path}: {key} has the labels {labels[key]!r} and {value.strip()!r}")
    if not labels:
        raise ValueError(f"--labels {path}: is empty")
    return labels


def _field(name: str, text: bytes, field: str) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: is no JSON ({error})") from None
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, (dict, list, bool)):
        raise ValueError(f"{name}: its field {field} is {json.dumps(value)[:40]}, neither a number nor a name")
    return "" if value is None else str(value).strip()


def _checked_name(key: str, value: str) -> str:
    """Return a class name. Raises ValueError for a text that is rather a number or a list."""
    if re.match(r"[\[{]|[-+]?[\d.]+([eE][-+]?\d+)?$", value):
        raise ValueError(f"{key}: the label {value[:40]!r} is neither a number from 0 nor a name")
    return value


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

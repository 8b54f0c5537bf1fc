"""Lists of class names: classes.json beside the shards, and lists that a user gives."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dsmim.shards.atomic import write_atomically

CLASSES = "classes.json"


def read_names(path: Path) -> tuple[str, ...]:
    """Return class names in the order of their numbers: a JSON list, a JSON object name → number, or lines of text.

    Raises ValueError when the file cannot be read, or names or numbers are not unique.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a list of classes ({error})") from None
    if isinstance(names, dict):
        if sorted(names.values(), key=str) != sorted(range(len(names)), key=str):
            raise ValueError(f"{path}: its {len(names)} classes are not numbered from 0 to {len(names) - 1}")
        names = sorted(names, key=names.get)
    names = [str(name) for name in names if name != ""] if isinstance(names, list) else []
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: should list class names, each once: a JSON list, or one name per line")
    return tuple(names)


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


def write_classes(path: Path, classes: list[str]) -> None:
    """Write the list of class names, one for all shards of the folder.

    Raises ValueError when the folder has another list, whose numbers mean other classes.
    """
    if path.exists() and json.loads(path.read_text()) != classes:
        raise ValueError(
            f"{path}: lists other classes, with other numbers; build from a table of path,number or into another folder"
        )
    write_atomically(path, (json.dumps(classes, indent=0) + "\n").encode())

"""Lists of class names: classes.json beside the shards, and lists that a user gives."""

from __future__ import annotations

import json
import shlex
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


def write_classes(path: Path, classes: list[str]) -> None:
    """Write the list of class names, one for all shards of the folder.

    Raises ValueError when the folder has another list, whose numbers mean other classes.
    """
    if path.exists() and (there := list(read_names(path))) != classes:
        raise ValueError(f"{path}: {_difference(path, there, classes)}")
    write_atomically(path, (json.dumps(classes, indent=0) + "\n").encode())


def _difference(path: Path, there: list[str], here: list[str]) -> str:
    """Return how two lists differ, and the fix."""
    lost, new = [[name for name in a if name not in set(b)] for a, b in ((there, here), (here, there))]
    named = ", ".join((new or lost or here)[:10])
    if new:
        return (
            f"does not list {len(new)} of the {len(here)} classes here ({named}), so numbers would mean other classes; "
            "build into another folder, or leave these classes out"
        )
    what = f"{len(lost)} more classes ({named})" if lost else "the same classes with other numbers"
    return f"lists {what}; to number these images by it, add: --classes {shlex.quote(str(path))}"

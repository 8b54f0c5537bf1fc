"""The names of classes: `classes.json`, which `dsmim shards build` writes beside the shards."""

from __future__ import annotations

import json
from pathlib import Path

from braceexpand import braceexpand

from dsmim.recipe import Data
from dsmim.shards.remote import is_remote

FILE = "classes.json"


def class_names(data: Data, classes: int, file: Path | None = None) -> list[str]:
    """Return the name of every class by its number; an empty list if there is no list of names.

    file: the list; None: classes.json beside the local shards of data.train, or else beside those of data.val. Raises
    ValueError when it is no list of names, or has not one name for each class.
    """
    found = [file] if file is not None else _beside(data.train) or _beside(data.val)
    lists = {path: _read(path) for path in found}
    for path, names in lists.items():
        if len(names) != classes:
            raise ValueError(
                f"{path}: lists {len(names)} classes, the model has {classes}; give the list of the shards that it was "
                "trained on by --classes FILE"
            )
        if names != lists[found[0]]:
            raise ValueError(f"{path} and {found[0]} list other classes; give one of them by --classes FILE")
    return lists[found[0]] if found else []


def _beside(patterns: str | list[str] | None) -> list[Path]:
    """Return the lists in the folders of the shards that patterns name. The shards need not be there any more."""
    words = [patterns] if isinstance(patterns, str) else patterns or []
    shards = [Path(path) for word in words if not is_remote(word) for path in braceexpand(word)]
    folders = dict.fromkeys(shard if shard.is_dir() else shard.parent for shard in shards)
    return [folder / FILE for folder in folders if (folder / FILE).is_file()]


def _read(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a list of class names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: is not a JSON list of class names")
    return names

"""The names of classes: `classes.json`, which `dsmim shards build` writes beside the shards."""

from __future__ import annotations

from pathlib import Path

from braceexpand import braceexpand

from dsmim.data.from_recipe import class_items
from dsmim.recipe import Data
from dsmim.shards.classes import CLASSES, read_names
from dsmim.shards.remote import is_remote
from dsmim.shards.walk import matching


def class_names(data: Data, classes: int, file: Path | None = None) -> list[str]:
    """Return the name of every class by its number; an empty list if there is no list of names.

    file: the list; None: classes.json beside the local shards of data.train, or else beside those of data.val. Raises
    ValueError when it is no list of names (see read_names), or has not one name for each class.
    """
    found = [file] if file is not None else _beside(data.train) or _beside(data.val)
    lists = {path: _in_use(list(read_names(path)), data, classes) for path in found}
    for path, names in lists.items():
        if len(names) != classes:
            raise ValueError(
                f"{path}: lists {len(names)} classes, the model has {classes}; give the list of the shards that it was "
                "trained on by --classes FILE"
            )
        if names != lists[found[0]]:
            raise ValueError(f"{path} and {found[0]} list other classes; give one of them by --classes FILE")
    return lists[found[0]] if found else []


def _in_use(names: list[str], data: Data, classes: int) -> list[str]:
    """Return the names of the classes that data.classes leaves, in its order. A list of these alone stays as it is."""
    if data.classes is None or len(names) == classes:
        return names
    items = class_items(data.classes)
    return [names[int(item)] if str(item).isdigit() and int(item) < len(names) else str(item) for item in items]


def _beside(patterns: str | list[str] | None) -> list[Path]:
    """Return the lists in the folders of the shards that patterns name. The shards need not be there any more."""
    words = [patterns] if isinstance(patterns, str) else patterns or []
    shards = [Path(path) for word in words if not is_remote(word) for path in braceexpand(word)]
    folders = (str(shard if shard.is_dir() else shard.parent) for shard in shards)
    found = (Path(place) / CLASSES for folder in folders for place in matching(folder))
    return [path for path in dict.fromkeys(found) if path.is_file()]

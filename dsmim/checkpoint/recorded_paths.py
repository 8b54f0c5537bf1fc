"""The relative paths of shards that a run's recipe holds, for commands that are started in another folder than the run.

state.json records the folder where the run was started.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from dsmim.recipe import Recipe
from dsmim.shards.remote import is_remote
from dsmim.shards.walk import matching

STARTED_IN = "started_in"
"""Key of state.json: the folder where the run was started first."""
_KEYS = ("train", "val", "index_dir", "subset")


def find_shards(data: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's section `data` with paths that lead to the shards.

    In another folder than that where the run was started, relative paths become absolute: in this folder if they name
    something here, else in the run's. state: of a checkpoint of the run; an older one without STARTED_IN changes
    nothing.
    """
    folder = state.get(STARTED_IN)
    if folder is None or Path(folder) == Path.cwd():
        return data
    return data | {key: _found(data[key], folder) for key in _KEYS if data.get(key)}


def find_recipe_shards(recipe: Recipe, state: dict[str, Any]) -> Recipe:
    """Return a recipe with find_shards applied to its section `data`."""
    found = find_shards(recipe.data.model_dump(include=set(_KEYS)), state)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=found)})


def _found(paths: str | list[str], folder: str) -> str | list[str]:
    if isinstance(paths, list):
        return [_found(path, folder) for path in paths]
    elsewhere = is_remote(paths) or paths.startswith("~") or os.path.isabs(paths)  # noqa: PTH117 - may be a pattern
    return paths if elsewhere else str((Path.cwd() if _exists(paths) else Path(folder)) / paths)


def _exists(pattern: str) -> bool:
    return any(matching(text) for text in braceexpand(pattern))

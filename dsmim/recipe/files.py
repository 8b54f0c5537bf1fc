"""Recipe files: where they are, and one file with those that it starts from (`base: NAME`) as one tree of keys."""

from __future__ import annotations

import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dsmim.recipe.errors import RecipeError, nearest, sections_of
from dsmim.recipe.schema import Recipe
from dsmim.recipe.section import Duration

BASE = "base"
OWN = ("name", "about")
"""Keys that describe one recipe, and are not taken from its base."""

Tree = dict[str, Any]

_NO_PERMISSION = (
    "data.allow_pipe: a file cannot allow commands, because it may come from others; remove it there, and give "
    "data.allow_pipe=true on the command line"
)


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A SafeLoader, in C if PyYAML has it, that refuses a key given twice. YAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def shipped_recipes() -> dict[str, Path]:
    """Return the file of every recipe that comes with dsmim, by its name."""
    folder = Path(str(resources.files("dsmim"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_tree(source: str) -> tuple[Tree, dict[str, Path]]:
    """Return the keys of a recipe (a shipped name, or a path) with its bases applied, and the owners of keys.

    Owners: dotted key → the file that gives its value, for a recipe with a base; empty without one. Sections are merged
    key by key. All other values are replaced: lists, durations, options, and a task of another name too.
    Raises RecipeError, which names the file.
    """
    (path, own), *bases = _chain(source)
    if not bases:
        return own, {}
    tree, owners = {}, {}
    for file, keys in [*reversed(bases), (path, own)]:
        inherited = keys if file == path else {key: value for key, value in keys.items() if key not in OWN}
        tree = _merged(tree, inherited, Recipe)
        owners |= dict.fromkeys(flatten(inherited), file)
    return tree, owners


def in_their_files(problems: list[str], owners: dict[str, Path]) -> list[str]:
    """Return the problems, each with the file that holds the key it begins with, where that is known."""
    return [problem + _place(problem.partition(":")[0], owners) for problem in problems]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value of all values of a tree that are no mappings."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _chain(source: str) -> list[tuple[Path, Tree]]:
    """Return the recipe's file and its keys, then those of its base, of the base's base, …"""
    path, found = _locate(source), []
    while True:
        keys = _read_yaml(path)
        base = keys.pop(BASE, None)
        found.append((path, keys))
        if base is None:
            return found
        path = _base_of(path, base)
        if any(path.samefile(file) for file, _ in found):
            names = " → ".join(str(file) for file in (*(file for file, _ in found), path))
            raise RecipeError(source, [f"{BASE}: {names}: a recipe cannot start from itself; remove one {BASE}"])


def _locate(source: str) -> Path:
    shipped = shipped_recipes()
    path = shipped.get(source, Path(source).expanduser())
    if not path.is_file():
        raise RecipeError(source, [f"no such file, and no shipped recipe of that name{nearest(source, list(shipped))}"])
    return path


def _base_of(file: Path, base: object) -> Path:
    """Return the file of a base that `file` names: a shipped recipe, or a path from the folder of `file`."""
    shipped = shipped_recipes()
    if not isinstance(base, str):
        raise RecipeError(str(file), [f"{BASE}: names one recipe, shipped or a file (given: {base!r})"])
    path = shipped.get(base, file.parent / Path(base).expanduser())
    if not path.is_file():
        near = nearest(base, list(shipped))
        raise RecipeError(str(file), [f"{BASE}: {base!r} is no shipped recipe, and {path} is no file{near}"])
    return path


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid YAML: {error}"]) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), ["the file must hold keys with values (key: value)"])
    if isinstance(data := tree.get("data"), dict) and data.get("allow_pipe"):
        raise RecipeError(str(path), [_NO_PERMISSION])
    return tree


def _merged(old: Tree, new: Tree, section: type[BaseModel]) -> Tree:
    """Return the keys of a section, with those of `new` in the place of those of `old`."""
    merged = old | new
    for key in old.keys() & new.keys():
        before, value, inner = old[key], new[key], _section_of(section, key)
        if inner is not None and isinstance(before, dict) and isinstance(value, dict):
            other_task = section is Recipe and key == "task" and value.get("name") not in (None, before.get("name"))
            merged[key] = value if other_task else _merged(before, value, inner)
    return merged


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the section that a key holds, None for another value: {epochs: 3} comes in the place of {steps: 5}."""
    field = section.model_fields.get(key)
    found = [] if field is None or typing.get_origin(field.annotation) is list else sections_of(field.annotation)
    return None if not found or issubclass(found[0], Duration) else found[0]


def _place(key: str, owners: dict[str, Path]) -> str:
    """Return ' (in FILE)' for a dotted key, for a section by its first key, and '' for a key of no file."""
    own = owners.get(key) or next((file for name, file in owners.items() if name.startswith(f"{key}.")), None)
    return f" (in {own})" if own else ""

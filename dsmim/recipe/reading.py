"""Read a recipe from YAML and key=value overrides, and report all its errors at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from dsmim.recipe.contradictions import contradictions
from dsmim.recipe.errors import RecipeError, explain
from dsmim.recipe.files import BASE, flatten, in_their_files, read_tree, shipped_recipes  # noqa: F401 - used from here
from dsmim.recipe.override_values import read_value
from dsmim.recipe.schema import Recipe

# Keys that may differ when a run resumes: they change its speed, or what is seen of it, not what it learns. data.train
# may name other paths, because the fingerprint of the shards there must be the same.
FREE_KEYS = (
    "about",
    "data.train", "data.val", "data.index_dir", "data.subset", "data.workers", "data.cache_dir",
    "data.cache_gb", "data.allow_pipe", "data.max_undecodable",
    "model.grad_checkpointing", "model.grad_checkpointing_stages", "model.sequential_stages", "model.compile",
    "batch.micro_batch", "batch.max_micro_batch", "batch.eval_batch",
    "engine.deepspeed", "engine.max_skipped", "engine.max_loss_growth", "engine.timeout_minutes",
    "engine.step_timeout_minutes",
    "validation", "checkpoint", "log",
)  # fmt: skip


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a shipped name or a path, with `key=value` overrides applied.

    Raises RecipeError (a ValueError) that lists every problem, each with its key and the fix.
    """
    keys, owners = read_tree(source)
    tree, problems = _overridden(keys, overrides)
    try:
        return parse_recipe(tree, source, problems)
    except RecipeError as error:
        given = tuple(item.partition("=")[0] for item in overrides)
        files = {key: file for key, file in owners.items() if not f"{key}.".startswith(tuple(f"{k}." for k in given))}
        raise RecipeError(source, in_their_files(error.problems, files)) from None


def stored_recipe(tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that a checkpoint or a file of weights keeps, with `key=value` overrides applied. Raises
    RecipeError, but not for contradictions: what had no effect in the training has none now."""
    tree, problems = _overridden(tree, overrides)
    return _validated(tree, source, problems, lambda recipe: [])


def parse_recipe(tree: dict[str, Any], source: str, problems: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a tree of keys. Raises RecipeError, which lists `problems` found before too."""
    return _validated(tree, source, problems, contradictions)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return `key: old → new` for every key that changes what is learned."""
    before, after = (flatten(r.model_dump(mode="json")) for r in (old, new))
    free = tuple(key + "." for key in FREE_KEYS)
    changed = [k for k in before | after if before.get(k) != after.get(k) and not (k + ".").startswith(free)]
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in changed]


def _given_twice(overrides: Sequence[str]) -> list[str]:
    """Return the problems of overrides of which only the last would count: a key given twice, or one whose section is
    given after it."""
    given = [item.partition("=")[::2] for item in overrides]
    keys, problems = [key for key, _ in given], []
    for key in dict.fromkeys(keys):
        values = [value for other, value in given if other == key]
        if len(values) > 1:
            problems.append(_twice(key, values))
        last = len(keys) - 1 - keys[::-1].index(key)
        if inner := [one for one in keys[:last] if one.startswith(f"{key}.")]:
            problems.append(f"{key}: given after {inner[0]}, which it would replace; give {key} first, or only one")
    return problems


def _twice(key: str, values: list[str]) -> str:
    shown = [*values[:3], f"… ({len(values)} in all)"] if len(values) > 3 else values
    hint = ""
    if len(set(values)) > 1 and all("/" in value or ".tar" in value for value in values):
        hint = f"; if the shell made them of one pattern {{…}}, quote it: '{key}=…{{000000..000003}}.tar'"
    return f"{key}: given {len(values)} times: {', '.join(shown)}; give it once{hint}"


def _validated(
    tree: dict[str, Any], source: str, problems: Sequence[str], further: Callable[[Recipe], list[str]]
) -> Recipe:
    """Return the recipe of a tree. Raises RecipeError with `problems`, those of its keys, and `further` ones of it."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(source, [*problems, *explain(error, Recipe)]) from None
    if found := [*problems, *further(recipe)]:
        raise RecipeError(source, found)
    return recipe


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of the tree with the overrides applied, and their problems."""
    tree = copy.deepcopy(tree)
    problems = _given_twice(overrides)
    return tree, problems + [problem for item in overrides if (problem := _override(tree, item))]


def _override(tree: dict[str, Any], item: str) -> str | None:
    """Apply one `a.b=value` to the tree. Return the problem, or None."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        return f"override {item!r} is not of the form key=value"
    if key == BASE:
        return f"override {item!r}: only a file names its {BASE}; give the recipe to start from in its place"
    *parents, leaf = key.split(".")
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            return f"override {item!r}: {part} is a value, not a section with keys"
    try:
        tree[leaf] = read_value(key, text)
    except yaml.YAMLError as error:
        return f"override {item!r}: the value is not valid YAML ({error})"
    return None

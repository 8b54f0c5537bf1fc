"""`dsmim recipes` and `dsmim samples`: the commands that show what a recipe says."""

from __future__ import annotations

import argparse

from dsmim.cli.words import add_overrides, add_recipe, command, count


def add_recipes(commands) -> None:
    """Add the command `dsmim recipes`."""
    about = "List the shipped recipes, or print one recipe with every default"
    recipes = command(commands, "recipes", about, _recipes)
    add_recipe(recipes, nargs="?")
    add_overrides(recipes)


def add_samples(commands) -> None:
    """Add the command `dsmim samples`."""
    samples = command(commands, "samples", "Print the keys of the samples that steps see, one per line", _samples)
    add_recipe(samples)
    samples.add_argument("--steps", type=_steps, required=True, metavar="A:B", help="steps A to B-1, counted from 0")
    samples.add_argument("--world-size", type=count, default=1, metavar="N", help="number of ranks (default: 1)")
    samples.add_argument(
        "--rank", type=int, metavar="R", help="only the share of this rank (default: the whole global batch)"
    )
    samples.add_argument("--shards", action="store_true", help="print the shard too, after a tab")
    add_overrides(samples)


def _recipes(options: argparse.Namespace) -> None:
    from dsmim.recipe.reading import load_recipe, shipped_recipes

    if options.recipe:
        print(load_recipe(options.recipe, options.overrides).to_yaml(), end="")
        return
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:32} {first.lstrip('# ')}")


def _samples(options: argparse.Namespace) -> None:
    from dsmim.recipe.reading import load_recipe
    from dsmim.samples import sample_keys

    recipe = load_recipe(options.recipe, options.overrides)
    for key, shard in sample_keys(recipe, options.steps, options.world_size, options.rank):
        print(f"{key}\t{shard}" if options.shards else key)


def _steps(text: str) -> range:
    begin, colon, end = text.partition(":")
    if not (colon and begin.isdigit() and end.isdigit() and int(begin) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B with A < B")
    return range(int(begin), int(end))

"""`dsmim recipes` and `dsmim samples`: the commands that show what a recipe says."""

from __future__ import annotations

import argparse

from dsmim.cli.words import add_overrides, add_recipe, command, count, positive

A100_TFLOPS, UTILISATION = 312, 0.4
"""10¹² operations per second of an A100 in bfloat16, by its data sheet; and the share of them that a training uses: our
assumption, not a measurement."""


def add_recipes(commands) -> None:
    """Add the command `dsmim recipes`."""
    about = "List the shipped recipes with their cost, print one recipe with every default, or explain keys"
    recipes = command(commands, "recipes", about, _recipes)
    add_recipe(recipes, nargs="?")
    recipes.add_argument(
        "--explain", nargs="?", const="", metavar="KEY",
        help="print type, default and meaning of a key or a section (such as optim or optim.lr), or of all keys",
    )  # fmt: skip
    recipes.add_argument(
        "--tflops", type=positive, default=A100_TFLOPS * UTILISATION, metavar="RATE",
        help="10^12 operations per second that a GPU really does, for the column GPU-hours (default: %(default)g, "
        f"which is {UTILISATION} of an A100's {A100_TFLOPS} in bf16)",
    )  # fmt: skip
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
    from dsmim.recipe.explain import explained
    from dsmim.recipe.reading import load_recipe

    if options.explain is not None:
        print(explained(options.explain).lstrip("\n"))
    elif options.recipe:
        print(load_recipe(options.recipe, options.overrides).to_yaml(), end="")
    else:
        _print_table(options.tflops)


def _print_table(tflops: float) -> None:
    """Print a line per shipped recipe; a dash where a figure is not known."""
    from dsmim.recipe.cost import gpu_hours
    from dsmim.recipe.reading import load_recipe, shipped_recipes

    rows = [("recipe", "paper", "model", "data", "epochs", "GPU-hours", "expected")]
    for name in shipped_recipes():
        recipe = load_recipe(name)
        about, hours = recipe.about, gpu_hours(recipe, tflops)
        figures = (about.epochs and f"{about.epochs:g}", hours and _rounded(hours), about.result)
        rows.append((name, *(text or "-" for text in (about.paper, about.model, about.data, *figures))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(
        f"GPU-hours: of one GPU that does {tflops:g} * 10^12 operations per second; computed for forward and backward\n"
        "passes, not measured. Expected: as published, per cent of ImageNet-1K's validation images; only the demo and\n"
        "finetune_small were trained to their end here.\n"
    )
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


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

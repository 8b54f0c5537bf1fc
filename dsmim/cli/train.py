"""`dsmim train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsmim.cli.words import add_local_rank, add_overrides, add_recipe, add_run_dir, command
from dsmim.health.interrupt import Interrupt
from dsmim.health.outcome import COMPLETE, STOPPED


def add_train(commands) -> None:
    """Add the command `dsmim train`."""
    train = command(commands, "train", "Train a recipe, or resume its run", run_train)
    add_recipe(train)
    add_run_dir(train)
    add_local_rank(train)
    add_overrides(train)


def run_train(options: argparse.Namespace) -> int:
    """Train. Return COMPLETE, or STOPPED when the run was asked to stop and has saved everything."""
    interrupt = Interrupt()
    interrupt.listen()  # before the imports, which take seconds: a signal without a handler kills the process
    from dsmim.recipe.reading import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from dsmim.train import fit

    complete = fit(recipe, options.run_dir or Path("runs") / recipe.name, options.fork, interrupt)
    return COMPLETE if complete else STOPPED

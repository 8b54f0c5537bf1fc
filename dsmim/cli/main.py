"""The entry point: read the command line, run one command, end the process.

Nothing heavy is imported before a command runs, so that `dsmim --help` answers at once.
"""

from __future__ import annotations

import argparse
import codecs
import sys

from dsmim import __version__
from dsmim.cli.checkpoint import add_evaluate, add_export, run_evaluate
from dsmim.cli.ending import end
from dsmim.cli.images import add_predict, add_reconstruct, run_predict
from dsmim.cli.knn import add_knn, run_knn
from dsmim.cli.recipe import add_recipes, add_samples
from dsmim.cli.shards import add_shards
from dsmim.cli.submit import add_submit
from dsmim.cli.train import add_train, run_train
from dsmim.cli.words import add_local_rank
from dsmim.health.outcome import COMPLETE

RANK_COMMANDS = (run_train, run_evaluate, run_knn, run_predict)
"""The commands that every rank of a job runs."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return its exit status, or end the process with it: see ending.ENDINGS.

    Raises SystemExit(2) for wrong usage.
    """
    _accept_all_characters()
    options = _parse(arguments)
    is_rank = options.run in RANK_COMMANDS
    try:
        returned = options.run(options) or COMPLETE
    except (Exception, KeyboardInterrupt) as error:
        return end(error, None, is_rank)
    return end(None, returned, is_rank)


def _accept_all_characters() -> None:
    """Let standard output and error print any text in the encoding that they have."""
    codecs.register_error("dsmim", _encode_any)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="dsmim")


def _encode_any(error: UnicodeError) -> tuple[str | bytes, int]:
    """Print the bytes of a file's name as they are: a sample key holds them, in any encoding. Print other characters
    that the encoding lacks as their numbers, such as \\u2192."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. argparse takes key=value only directly after the recipe, and images only directly after
    the run; here they may follow options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    images = [word for word in rest if hasattr(options, "images") and not word.startswith("-")]
    overrides = [word for word in rest if hasattr(options, "overrides") and "=" in word and not word.startswith("-")]
    if unknown := [word for word in rest if word not in images and word not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if images:
        options.images = [*options.images, *images]
    elif overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _parser() -> argparse.ArgumentParser:
    about = "Train vision models with billions of parameters on DeepSpeed, from WebDataset shards."
    more = "`dsmim COMMAND --help` explains a command."
    parser = argparse.ArgumentParser("dsmim", description=about, epilog=more, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dsmim {__version__}")
    add_local_rank(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_shards(commands)
    add_samples(commands)
    add_train(commands)
    add_evaluate(commands)
    add_knn(commands)
    add_predict(commands)
    add_reconstruct(commands)
    add_submit(commands)
    add_export(commands)
    add_recipes(commands)
    return parser

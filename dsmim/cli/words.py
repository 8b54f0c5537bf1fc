"""What the parsers of several commands share: arguments, and the types of values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction


def command(commands, name: str, about: str, run: Callable) -> argparse.ArgumentParser:
    """Add a sub-command that calls `run(options)`. Return its parser."""
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser, **options) -> None:
    """Add the argument RECIPE; options as in argparse."""
    parser.add_argument("recipe", help="the name of a shipped recipe (see `dsmim recipes`), or a file", **options)


def add_overrides(parser: argparse.ArgumentParser, about: str = "recipe keys to change: batch.global_batch=64") -> None:
    """Add the arguments key=value …."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=about)


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the run to start or resume."""
    parser.add_argument(
        "--run-dir", type=home_path, metavar="DIR", help="folder of checkpoints and logs (default: runs/RECIPE)"
    )
    parser.add_argument("--fork", action="store_true", help="continue the run although its recipe has changed")


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept the option that the deepspeed launcher passes. It has no effect: ranks come from the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def home_path(text: str) -> Path:
    """Return a path, with ~ for the home folder where the shell has left it, as in --root=~/images."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises for ~name without such a user


def count(text: str) -> int:
    """Return a whole number from 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is smaller than 1")
    return value


def counts(text: str) -> list[int]:
    """Return the whole numbers from 1 in 10,20,100."""
    return [count(word) for word in text.split(",")]


def positive(text: str) -> float:
    """Return a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def image_key(text: str) -> str:
    """Return an extension as data.image_key holds it."""
    from dsmim.recipe.data import member_extension

    try:
        return member_extension(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def quality(text: str) -> int:
    """Return a JPEG quality, 1 to 100."""
    value = whole(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 100")
    return value


def whole(text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def share(text: str) -> Fraction:
    """Return a share above 0 and up to 1, exactly: 0.29 of 100 is 29, but not in floating point."""
    from fractions import Fraction  # it takes milliseconds, and `dsmim --help` does not need it

    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def splits(text: str) -> dict[str, float]:
    """Return the share of each name in train=0.9,val=0.1."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shares = {name: float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form train=0.9,val=0.1") from None
    if len(shares) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} gives a name twice")
    if not all(0 < value <= 1 for value in shares.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: every share must be above 0 and at most 1")
    return shares

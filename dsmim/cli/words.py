"""What the commands' parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction


def command(commands, name: str, help: str, run: Callable) -> argparse.ArgumentParser:
    """A sub-command that runs `run(options)`."""
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def count(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def quality(text: str) -> int:
    """A JPEG quality."""
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 100")
    return value


def share(text: str) -> Fraction:
    """A share above 0 up to 1, exact: 0.29 of 100 is 29, which it is not in floating point."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def splits(text: str) -> dict[str, float]:
    """Named shares: train=0.9,val=0.1."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shares = {name: float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form train=0.9,val=0.1") from None
    if len(shares) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} gives a name twice")
    if not all(0 < value <= 1 for value in shares.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: every share must lie between 0 and 1")
    return shares

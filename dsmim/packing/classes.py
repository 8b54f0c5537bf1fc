"""The numbers of classes: from names to numbers, names that are numbers, and what a build says about them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from dsmim.log import NAMED, some
from dsmim.shards.classes import read_names

LARGEST = 999_999_999
"""Highest class number that an index stores."""
LONGEST = 1_000_000
"""Most entries of a list of classes whose names are their numbers."""
SHOWN = 20
"""How many classes are printed: with more, the first and the last ones."""


def number_classes(
    names: Iterable[str], where: str, known: Path | None = None, numeric: str | None = None
) -> list[str]:
    """Return the names of the classes in the order of their numbers.

    known: a file that lists them. Otherwise they are numbered in the order of their text. If all names are numbers and
    the ways to number them in NUMERIC differ, `numeric` chooses one.
    Raises ValueError, beginning with `where`, when it is not given then, or a class is not listed.
    """
    names = set(names)
    if known:
        if numeric:
            raise ValueError("--numeric-classes has no effect with --classes; leave one of them out")
        return _listed(names, where, known)
    others = sorted(name for name in names if not is_number(name))
    if numeric and others:
        raise ValueError(f"--numeric-classes: classes of {where} are no numbers: {some(others, len(others))}")
    if others:
        return sorted(names)
    numbered = {choice: number(names) for choice, number in NUMERIC.items()}
    if numeric and numbered[numeric] is None:
        raise ValueError(f"--numeric-classes number: {where}: {_why_no_numbers(names)}; choose order or text")
    if not numeric and any(way != numbered["text"] for way in numbered.values()):
        raise ValueError(_question(names, numbered, where))
    return numbered[numeric or "text"]


def is_number(name: str) -> bool:
    """Return whether a name is a number from 0, as programs write them: 7, 007 or 7.0."""
    return re.fullmatch(r"[0-9]+(\.[0-9]+)?", name) is not None


def whole_number(name: str) -> int | None:
    """Return the class number that a name stands for; None when it is not whole or too large."""
    value = float(name)
    return int(value) if value.is_integer() and value <= LARGEST else None


def class_lines(classes: list[str], parts: dict[str, Counter[int]]) -> list[str]:
    """Return the lines that say what a build has: the classes, their numbers and counts.

    parts: for every split, class number → images. classes: the names by number; without names, numbers alone.
    """
    numbers = sorted({number for counts in parts.values() for number in counts} | set(range(len(classes))))
    if not numbers:
        return []
    shown = numbers if len(numbers) <= SHOWN else [*numbers[: SHOWN // 2], None, *numbers[-SHOWN // 2 + 1 :]]
    lines = [f"{len(numbers)} classes:"]
    lines += ["  …" if number is None else f"  {_label(number, classes)}: {_counts(number, parts)}" for number in shown]
    used = {number for counts in parts.values() for number in counts}
    if empty := numbers[-1] + 1 - len(used):
        labels = (_label(number, classes) for number in range(numbers[-1] + 1) if number not in used)
        lines.append(f"  {empty} class numbers have no images: {some(labels, empty)}")
    return lines


def _label(number: int, classes: list[str]) -> str:
    return f"{number} {classes[number]}" if classes else str(number)


def _counts(number: int, parts: dict[str, Counter[int]]) -> str:
    if len(parts) == 1:
        return f"{sum(counts[number] for counts in parts.values())} images"
    return ", ".join(f"{name} {counts[number]}" for name, counts in parts.items())


def _listed(names: set[str], where: str, known: Path) -> list[str]:
    classes = list(read_names(known))
    if missing := sorted(names - set(classes)):
        numbers = " (class numbers in a table need no --classes)" if all(map(is_number, missing)) else ""
        raise ValueError(
            f"{where}: {len(missing)} of its classes are not in {known}: {some(missing, len(missing))}; leave them "
            f"out, or add them to the end of the list{numbers}"
        )
    return classes


def _as_numbers(names: set[str]) -> list[str] | None:
    """Let every name be its number. A number without a class is its own name."""
    if _why_no_numbers(names):
        return None
    by_number = {whole_number(name): name for name in names}
    return [by_number.get(number, str(number)) for number in range(max(by_number) + 1)]


def _why_no_numbers(names: set[str]) -> str | None:
    numbers = {name: whole_number(name) for name in sorted(names)}
    if odd := [name for name, number in numbers.items() if number is None or number >= LONGEST]:
        return f"not whole, or too large: {some(odd, len(odd))}"
    if len(set(numbers.values())) < len(names):
        repeated = Counter(numbers.values())
        twice = [name for name, number in numbers.items() if repeated[number] > 1]
        return f"several names for one number: {some(twice, len(twice))}"
    return None


NUMERIC: dict[str, Callable[[set[str]], list[str] | None]] = {
    "number": _as_numbers,
    "order": lambda names: sorted(names, key=lambda name: (float(name), name)),
    "text": sorted,
}
"""How names that are numbers become class numbers: the name is the number; from 0 in the order of the numbers (timm);
from 0 in the order of the text (torchvision)."""
_ABOUT = {"number": "the name is the class number", "order": "sorted as numbers, as timm does"}
_ABOUT |= {"text": "sorted as text, as torchvision does"}


def _question(names: set[str], numbered: dict[str, list[str] | None], where: str) -> str:
    lines = [f"{where}: the classes are named by numbers; choose their class numbers by --numeric-classes:"]
    ordered = NUMERIC["order"](names)
    shown = ordered if len(ordered) <= NAMED else [*ordered[:3], None, *ordered[-3:]]
    for choice, classes in numbered.items():
        if classes is None:
            lines.append(f"  {choice}: not possible ({_why_no_numbers(names)})")
            continue
        numbers = {name: number for number, name in enumerate(classes)}
        words = ["…" if name is None else f"{name} → {numbers[name]}" for name in shown]
        lines.append(f"  {choice}: {', '.join(words)} ({_ABOUT[choice]})")
    return "\n".join(lines)

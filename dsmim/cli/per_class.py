"""What `dsmim evaluate --per-class` prints, and the file of --confusion."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

ALL = 50
"""More classes than this are not all printed."""
WORST = 20
"""So many are printed then: those with the lowest accuracy."""


def table(classes: list[dict[str, Any]]) -> str:
    """Return a line per class, or if there are many, one for each class of the lowest accuracy.

    classes: as in the metrics of tasks/per_class.py.
    """
    rows, note = classes, ""
    if len(classes) > ALL:
        measured = [row for row in classes if row["samples"]]
        rows = sorted(measured, key=lambda row: row["accuracy"])[:WORST]
        note = f"\nthe {len(rows)} lowest of {len(measured)} classes with samples; --json FILE has all"
    width = max((len(title(row)) for row in rows), default=0)
    return "\n".join(["class".ljust(width) + "  accuracy  samples", *(_line(row, width) for row in rows)]) + note


def title(row: dict[str, Any]) -> str:
    """Return the number of a class, and its name if it is known."""
    return f"{row['class']} {row['name']}".rstrip()


def write_confusion(out: Path, classes: list[dict[str, Any]], matrix: list[list[int]]) -> None:
    """Write a CSV: a row per label and a column per prediction, counts of samples."""
    from dsmim.shards.atomic import write_atomically

    names = [row["name"] or row["class"] for row in classes]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label \\ prediction", *names])
    writer.writerows([name, *counts] for name, counts in zip(names, matrix, strict=True))
    write_atomically(out, text.getvalue().encode())


def _line(row: dict[str, Any], width: int) -> str:
    accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
    return f"{title(row).ljust(width)}  {accuracy:>8}  {row['samples']:>7}"

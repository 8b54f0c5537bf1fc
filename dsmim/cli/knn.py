"""`dsmim knn`: what an encoder knows, without training a classifier."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from dsmim.cli.checkpoint import add_checkpoint, add_table
from dsmim.cli.words import add_local_rank, add_overrides, command, counts, positive


def add_knn(commands) -> None:
    """Add the command `dsmim knn`."""
    about = "Classify data.val by the nearest neighbours in data.train: the same figures at any world size"
    knn = command(commands, "knn", about, run_knn)
    add_checkpoint(knn)
    about = "numbers of neighbours that vote, as 10,20,100 (default: 20)"
    knn.add_argument("--k", type=counts, default=[20], metavar="K,…", help=about)
    about = "a neighbour's vote is exp(similarity / T) (default: 0.07, as DINO)"
    knn.add_argument("--temperature", type=positive, default=0.07, metavar="T", help=about)
    knn.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add_table(knn)
    add_local_rank(knn)
    add_overrides(knn, "recipe keys to change: data.train='shards/train-*.tar'")


def run_knn(options: argparse.Namespace) -> None:
    """Classify by neighbours. Rank 0 prints the figures, on the last line as JSON."""
    from dsmim import strict_json
    from dsmim.cluster.placement import is_first
    from dsmim.knn import knn

    figures = knn(options.checkpoint, options.overrides, options.k, options.temperature, options.which)
    if not is_first(os.environ):
        return
    if options.json:
        options.json.write_text(strict_json.dumps(figures) + "\n")
    if options.table:
        print(_table(figures))
    print(strict_json.dumps(figures))


def _table(figures: dict[str, Any]) -> str:
    """Return a line per number of neighbours, then what all have in common."""
    from dsmim.cli.figures import figure_table, shown

    names = list(figures["knn"][0])
    rows = [names, *([shown(name, row[name]) for name in names] for row in figures["knn"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, figure_table({name: value for name, value in figures.items() if name != "knn"})])

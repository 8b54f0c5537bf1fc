"""`dsmim evaluate` and `dsmim export`: the commands that read a checkpoint."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dsmim.cli.words import add_local_rank, add_overrides, command


def add_evaluate(commands) -> None:
    """Add the command `dsmim evaluate`."""
    about = "Measure a checkpoint on data.val: the same figures at any world size"
    evaluate = command(commands, "evaluate", about, run_evaluate)
    add_checkpoint(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    evaluate.add_argument("--per-class", action="store_true", help="measure every class of a classifier too")
    evaluate.add_argument("--confusion", type=Path, metavar="FILE.csv", help="write the confusion matrix to this file")
    add_classes(evaluate)
    add_local_rank(evaluate)
    add_overrides(evaluate)


def add_export(commands) -> None:
    """Add the command `dsmim export`."""
    export = command(commands, "export", "Write the weights of a checkpoint to a file for other tools", _export)
    add_checkpoint(export)
    layouts = "timm (default), the authors of the network, or dsmim with all that another run starts from"
    export.add_argument("--to", choices=["timm", "authors", "dsmim"], default="timm", help=f"whose names: {layouts}")
    export.add_argument("out", type=Path, help="the file to write, .safetensors or .pth; --to timm: or a folder")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a checkpoint, and the choice of its weights."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest valid checkpoint)")
    about = "use the moving average of the weights (optim.ema_decay)"
    parser.add_argument("--ema", dest="which", action="store_const", const="ema", default="fp32", help=about)


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the classes."""
    about = "list of the classes' names, JSON or lines of text (default: classes.json beside the training shards)"
    parser.add_argument("--classes", type=Path, metavar="FILE", help=about)


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluate. Rank 0 prints the figures, on the last line as JSON."""
    from dsmim import strict_json
    from dsmim.cli.per_class import table, write_confusion
    from dsmim.cluster.placement import is_first
    from dsmim.evaluate import evaluate

    figures = evaluate(options.checkpoint, options.overrides, options.which, _measured(options))
    if not is_first(os.environ):
        return
    if confusion := figures.pop("confusion", None):
        write_confusion(options.confusion, figures["classes"], confusion)
    if options.json:
        options.json.write_text(strict_json.dumps(figures) + "\n")
    if classes := figures.pop("classes", None):
        print(table(classes))
    print(strict_json.dumps(figures))


def _measured(options: argparse.Namespace):
    """Return what makes the task that the options ask for from a recipe."""
    from functools import partial

    from dsmim.tasks import build_task
    from dsmim.tasks.per_class import Confusion, PerClass

    if options.confusion or options.per_class:
        return partial(Confusion if options.confusion else PerClass, names=options.classes)
    if options.classes:
        raise ValueError("--classes has no effect without --per-class or --confusion: give one too, or leave it out")
    return build_task


def _export(options: argparse.Namespace) -> None:
    from dsmim.weights.export import export

    print(export(options.checkpoint, options.out, options.to, options.which))

"""`dsmim evaluate` and `dsmim export`: the commands that read a checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsmim.cli.words import add_local_rank, add_overrides, command

if TYPE_CHECKING:
    from dsmim.recipe import Recipe
    from dsmim.tasks import Task


def add_evaluate(commands) -> None:
    """Add the command `dsmim evaluate`."""
    about = "Measure a checkpoint on data.val: the same figures at any world size"
    evaluate = command(commands, "evaluate", about, run_evaluate)
    add_checkpoint(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    evaluate.add_argument("--per-class", action="store_true", help="measure every class of a classifier too")
    evaluate.add_argument("--confusion", type=Path, metavar="FILE.csv", help="write the confusion matrix to this file")
    add_classes(evaluate)
    about = "right labels of the samples, of which one may have several: real (ImageNet-ReaL), or a JSON file"
    evaluate.add_argument("--labels", metavar="real|FILE.json", help=about)
    about = "what the samples' labels mean: imagenet-a, imagenet-r, or a file with a class of the model per label"
    evaluate.add_argument("--label-map", metavar="NAME|FILE", help=about)
    add_table(evaluate)
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


def add_table(parser: argparse.ArgumentParser) -> None:
    """Add the option that prints a table."""
    parser.add_argument("--table", action="store_true", help="print the figures as a table too, before the JSON line")


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluate. Rank 0 prints the figures, on the last line as JSON."""
    from dsmim import strict_json
    from dsmim.cli.figures import figure_table
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
    if options.table:
        print(figure_table(figures))
    print(strict_json.dumps(figures))


def _measured(options: argparse.Namespace) -> Callable[[Recipe], Task]:
    """Return what makes the task that the options ask for from a recipe."""
    from dsmim.tasks import build_task
    from dsmim.tasks.classify import Classify
    from dsmim.tasks.label_map import read_label_map
    from dsmim.tasks.per_class import Confusion, PerClass
    from dsmim.tasks.real_labels import RealLabels

    per_class = options.confusion or options.per_class
    if options.classes and not per_class:
        raise ValueError("--classes has no effect without --per-class or --confusion: give one too, or leave it out")
    if options.labels:
        _refuse_beside_labels(options)
        return partial(RealLabels, source=options.labels)
    if not (per_class or options.label_map):
        return build_task
    kind = partial(Confusion if options.confusion else PerClass, names=options.classes) if per_class else Classify

    def measured(recipe: Recipe) -> Task:
        task = kind(recipe)
        if options.label_map:
            task.use_label_map(read_label_map(options.label_map, recipe.task.num_classes))
        return task

    return measured


def _refuse_beside_labels(options: argparse.Namespace) -> None:
    given = {"--per-class": options.per_class, "--confusion": options.confusion, "--label-map": options.label_map}
    if names := [name for name, value in given.items() if value]:
        raise ValueError(
            f"--labels cannot be used with {' and '.join(names)}: an image may have several right labels, which are "
            "numbers of the model's classes; give one of them"
        )


def _export(options: argparse.Namespace) -> None:
    from dsmim.weights.export import export

    print(export(options.checkpoint, options.out, options.to, options.which))

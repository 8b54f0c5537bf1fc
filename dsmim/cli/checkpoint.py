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
    _add_checkpoint(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add_local_rank(evaluate)
    add_overrides(evaluate)


def add_export(commands) -> None:
    """Add the command `dsmim export`."""
    export = command(commands, "export", "Write the weights of a checkpoint to a file for other tools", _export)
    _add_checkpoint(export)
    layouts = "timm (default), the authors of the network, or dsmim with all that another run starts from"
    export.add_argument("--to", choices=["timm", "authors", "dsmim"], default="timm", help=f"whose names: {layouts}")
    export.add_argument("out", type=Path, help="the file to write, .safetensors or .pth; --to timm: or a folder")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest valid checkpoint)")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (optim.ema_decay)")


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluate. Rank 0 prints the figures."""
    from dsmim import strict_json
    from dsmim.cluster.placement import is_first
    from dsmim.evaluate import evaluate

    figures = evaluate(options.checkpoint, options.overrides, "ema" if options.ema else "fp32")
    if is_first(os.environ):
        print(strict_json.dumps(figures))
        if options.json:
            options.json.write_text(strict_json.dumps(figures) + "\n")


def _export(options: argparse.Namespace) -> None:
    from dsmim.weights.export import export

    print(export(options.checkpoint, options.out, options.to, "ema" if options.ema else "fp32"))

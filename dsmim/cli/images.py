"""`dsmim predict` and `dsmim reconstruct`: the commands that show a trained network images."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from dsmim.cli.checkpoint import add_checkpoint, add_classes
from dsmim.cli.words import add_local_rank, command, count

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=.*", re.DOTALL)
DRAWN = 8


def add_predict(commands) -> None:
    """Add the command `dsmim predict`."""
    about = "Classify images, with or without labels, into a table: the same at any world size"
    predict = command(commands, "predict", about, run_predict)
    add_checkpoint(predict)
    _add_images(predict, "+", "")
    predict.add_argument("--out", type=Path, required=True, help="the table to write: .csv, or .parquet with pyarrow")
    predict.add_argument("--top", type=count, default=5, metavar="K", help="most probable classes of each (default: 5)")
    add_classes(predict)
    add_local_rank(predict)


def add_reconstruct(commands) -> None:
    """Add the command `dsmim reconstruct`."""
    about = "Draw images, their hidden parts, and what a SimMIM run makes of these"
    reconstruct = command(commands, "reconstruct", about, _reconstruct)
    add_checkpoint(reconstruct)
    _add_images(reconstruct, "*", " (default: the run's data.val)")
    reconstruct.add_argument("--out", type=Path, required=True, help="a picture (.png) or a page (.html)")
    more = f"draw the first N images (default: {DRAWN}, or as many as are given by name)"
    reconstruct.add_argument("--count", type=count, metavar="N", help=more)


def _add_images(parser: argparse.ArgumentParser, number: str, default: str) -> None:
    about = f"image files, folders, or shards{default}; recipe keys to change (data.workers=0) may follow"
    parser.add_argument("images", nargs=number, help=about)


def run_predict(options: argparse.Namespace) -> None:
    """Predict. Rank 0 writes the table."""
    from dsmim.cluster.placement import is_first
    from dsmim.predict import check_output, predict, write_predictions

    images, overrides = _divided(options)
    if not images:
        raise ValueError("predict: no images given; give image files, folders, or shards (.tar)")
    check_output(options.out)
    found = predict(options.checkpoint, images, overrides, options.top, options.which, options.classes)
    if not is_first(os.environ):
        return
    write_predictions(found, options.out)
    if not any(found.names):
        print("no classes.json beside data.train: classes are numbers; give names by --classes FILE", file=sys.stderr)
    faults = f", {found.undecodable} of them undecodable and left empty" if found.undecodable else ""
    print(f"{options.out}: {len(found.images)} images{faults}, by {found.source}")


def _reconstruct(options: argparse.Namespace) -> None:
    from dsmim.reconstruct import check_output, reconstruct, save

    check_output(options.out)
    images, overrides = _divided(options)
    wanted = options.count or max(DRAWN, len(images))
    drawings, there, faults = reconstruct(options.checkpoint, images, overrides, wanted, options.which)
    for fault in faults:
        print(f"undecodable image left out: {fault}", file=sys.stderr)
    save(drawings, options.out, f"Reconstructions by {options.checkpoint}")
    print(f"{options.out}: {len(drawings)} of {there} images" + (", more by --count N" if wanted < there else ""))


def _divided(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the images and the overrides. A word such as data.workers=0 is an override unless a file is called so."""
    overrides = [word for word in options.images if _OVERRIDE.fullmatch(word) and not Path(word).exists()]
    return [word for word in options.images if word not in overrides], overrides

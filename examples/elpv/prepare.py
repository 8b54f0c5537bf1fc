"""Prepare the data of the demo: split 2,624 photographs of solar cells (elpv-dataset), and build shards of them.

The images come with the PyPI package elpv-dataset (S. Deitsch et al., Solar Energy 185, 2019; CC BY-NC-SA 4.0).
"""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

CLASSES = ("mono, intact", "mono, defective", "poly, intact", "poly, defective")
TEST, VALIDATION, LABELLED_SHARE = 720, 144, 0.2
SEED = 0
LICENCE = (
    "The images are the ELPV data set, licensed CC BY-NC-SA 4.0 (attribution, no commercial use, share alike):\n"
    "  S. Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence\n"
    "  images, Solar Energy 185 (2019). They were installed as the package elpv-dataset and are not part of dsmim."
)


def image_root() -> Path:
    """Return the folder of the installed package that the image paths start from."""
    return Path(find_spec("elpv_dataset").origin).parent / "data"


def read_labels(root: Path) -> list[tuple[str, int]]:
    """Return (path, label) of every image: crystal type × whether the defect probability is at least 0.5."""
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line.strip()]
    return [(path, 2 * (kind == "poly") + (float(probability) >= 0.5)) for path, probability, kind in rows]


def split(items: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Draw random test and validation sets. The rest is for training, where a fifth of each class keeps its label.

    Cells of one module look alike, and the data set does not say which belong together. So this test set is easier than
    cells of new modules would be.
    """
    generator = np.random.default_rng(SEED)
    mixed = [items[i] for i in generator.permutation(len(items))]
    parts = {"test": mixed[:TEST], "val": mixed[TEST : TEST + VALIDATION], "train": mixed[TEST + VALIDATION :]}
    by_class = [[item for item in parts["train"] if item[1] == label] for label in range(len(CLASSES))]
    parts["labelled"] = [item for items in by_class for item in items[: round(len(items) * LABELLED_SHARE)]]
    return parts


def prepare(out: Path) -> dict[str, int]:
    """Write the tables and build the shards by `dsmim shards build`. Return the number of images in each part.

    `train` has no labels. Images are shrunk from 300 to 128 pixels; the demo's model sees 96 of them.
    """
    root = image_root()
    parts = split(read_labels(root))
    if not (out / "done").exists():
        for name, items in parts.items():
            build(name, items, root, out, labels=name != "train")
        (out / "done").touch()
    return {name: len(items) for name, items in parts.items()}


def build(name: str, items: list[tuple[str, int]], root: Path, out: Path, labels: bool) -> None:
    """Build the shards NAME-*.tar of these images in the folder `out`, with or without their labels."""
    out.mkdir(parents=True, exist_ok=True)
    table = out / f"{name}.tsv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["path", "label"] if labels else ["path"])
        writer.writerows([path, int(label)] if labels else [path] for path, label in items)
    for old in out.glob(f"{name}-*.tar*"):
        old.unlink()
    command = [Path(sys.executable).parent / "dsmim", "shards", "build", table, out, "--name", name, "--root", root]
    subprocess.run([str(w) for w in [*command, "--short-side", 128, "--per-shard", 100, "--workers", 1]], check=True)

"""Measure what augmentation costs on one core: milliseconds from an encoded image to an augmented one.

    python benchmarks/augmentation.py [IMAGE.jpg] [--size 224] [--rounds 30]

Every round takes one image of each kind, so that a busy machine slows all of them alike; the median is reported.
Without IMAGE it is scikit-learn's china.jpg, 640 x 427. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dsmim.data.streams import own_stream, reseed
from dsmim.data.transforms import train_transform
from dsmim.recipe import Augment

RRC, SRC = {"crop_scale": (0.08, 1.0)}, {"crop": "simple"}
COLOURS = {"three_augment": True, "color_jitter": 0.3}
KINDS = {
    "random resized crop": RRC,
    "simple random crop": SRC,
    "random resized crop, 3-Augment, colour jitter": RRC | COLOURS,
    "simple random crop, 3-Augment, colour jitter": SRC | COLOURS,
    "random resized crop, RandAugment, erasing": RRC | {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure((options.image or _photograph()).read_bytes(), options.size, options.rounds)
    for kind, milliseconds in figures.items():
        print(f"{kind:48} {milliseconds:6.2f} ms")
    print(json.dumps(figures))


def measure(data: bytes, size: int, rounds: int) -> dict[str, float]:
    """Return the median of the milliseconds per image, by kind."""
    transforms = {kind: train_transform(Augment(interpolation="bicubic", **keys), size) for kind, keys in KINDS.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with own_stream():
        for number in range(-3, rounds):  # three to warm up
            for kind, transform in transforms.items():
                reseed(number)
                begin = time.perf_counter()
                transform(data)
                taken[kind].append(1000 * (time.perf_counter() - begin))
    return {kind: round(statistics.median(times[3:]), 2) for kind, times in taken.items()}


def _photograph() -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images/china.jpg"


if __name__ == "__main__":
    main()

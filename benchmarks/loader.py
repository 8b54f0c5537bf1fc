"""Measure how fast one core decodes and augments photographs like ImageNet's, and compare with other pipelines.

    python benchmarks/loader.py [--quick] [--images DIR] [--cache DIR]

All pipelines read the same images, in turn in every round, in one process on one thread. A figure is the median over
the rounds of a ratio within one round, so that a change of the machine's speed affects both sides. Files come from the
page cache: disks are not measured. Progress is printed to standard error; the last line of standard output is one JSON
object.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from photos import CACHE, make_photos
from PIL import Image
from pipelines import (
    DEIT3,
    SIMMIM,
    Crop,
    Rate,
    Shards,
    decode_bound,
    make_shards,
    ours,
    ours_with_workers,
    papers,
    webdataset_pipeline,
)
from torchvision.transforms.v2 import functional as TF

from dsmim import strict_json

SHORT_SIDE = 256


def all_pipelines(photos: Path, samples: int) -> dict[str, Rate]:
    """Return all pipelines that are timed, in the order of a round."""
    original, small = make_shards(photos, "original", None), make_shards(photos, f"short{SHORT_SIDE}", SHORT_SIDE)
    return {
        "papers_pipeline": papers(photos, SIMMIM, samples),
        "dsmim": ours(original, SIMMIM, samples),
        "decode_bound": decode_bound(original, SIMMIM),
        "dsmim_short_side_256": ours(small, SIMMIM, samples),
        "webdataset": webdataset_pipeline(original, SIMMIM, samples),
        "dsmim_1_worker": ours_with_workers(original, SIMMIM, 1),
        "dsmim_2_workers": ours_with_workers(original, SIMMIM, 2),
        "deit3_papers_pipeline": papers(photos, DEIT3, samples),
        "deit3_dsmim": ours(original, DEIT3, samples),
        "deit3_decode_bound": decode_bound(original, DEIT3),
        "deit3_dsmim_short_side_256": ours(small, DEIT3, samples),
    }


def largest_difference(shards: Shards, crop: Crop) -> float:
    """Return the largest mean absolute difference (of 255), over all images, of dsmim's sample from Pillow's crop."""
    dataset, images = shards.dataset(crop, hflip=0.0), shards.images()
    worst = 0.0
    for position, (data, box) in enumerate(zip(images, shards.boxes(crop, images), strict=True)):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pillow = TF.resized_crop(image, **box, size=[crop.size] * 2, interpolation=crop.mode)
        difference = dataset[position]["image"].float() - TF.pil_to_tensor(pillow).float()
        worst = max(worst, difference.abs().mean().item())
    return worst


def measure(runs: dict[str, Rate], rounds: int) -> dict[str, list[float]]:
    """Return the samples per second of every pipeline in every round, after one round that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            rate = run()
            rates[name] += [rate] if number else []
        shown = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items() if values)
        print(f"round {number} of {rounds}: {shown or 'warm-up'}", file=sys.stderr, flush=True)
    return rates


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians of the ratios within a round."""

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True)), 3)

    return {
        "vs_papers_pipeline": ratio("dsmim", "papers_pipeline"),
        "of_decode_bound": ratio("dsmim", "decode_bound"),
        "short_side_256": ratio("dsmim_short_side_256", "papers_pipeline"),
        "vs_webdataset": ratio("dsmim", "webdataset"),
        "scaling_2_workers": ratio("dsmim_2_workers", "dsmim_1_worker"),
        "deit3_vs_papers_pipeline": ratio("deit3_dsmim", "deit3_papers_pipeline"),
        "deit3_of_decode_bound": ratio("deit3_dsmim", "deit3_decode_bound"),
        "deit3_short_side_256": ratio("deit3_dsmim_short_side_256", "deit3_papers_pipeline"),
    }


def report(rates: dict[str, list[float]], differences: dict[str, float], samples: int, rounds: int) -> dict:
    """Return the JSON object of the last line."""
    return {
        **ratios(rates),
        **{f"{prefix}max_mean_abs_diff": round(value, 3) for prefix, value in differences.items()},
        "samples_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "images": samples,
        "rounds": rounds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds: under a minute on two cores")
    parser.add_argument("--images", type=Path, help="folder of large photographs, instead of Debian's wallpapers")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where photographs and shards are kept")
    args = parser.parse_args()
    samples, rounds = (160, 4) if args.quick else (384, 9)  # multiples of BATCH
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        origin = args.images.resolve().name if args.images else "wallpapers"
        photos = make_photos(args.cache / f"photos-{samples}-{origin}", samples, args.images, args.cache)
        original = make_shards(photos, "original", None)
        differences = {crop.prefix: largest_difference(original, crop) for crop in (SIMMIM, DEIT3)}
        rates = measure(all_pipelines(photos, samples), rounds)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{time.perf_counter() - begin:.0f} seconds", file=sys.stderr)
    print(strict_json.dumps(report(rates, differences, samples, rounds)))


if __name__ == "__main__":
    main()

"""Measure the order of samples at ImageNet-22K's size: start, resume, memory of a worker, quality of the shuffle.

    python benchmarks/order_scale.py [--quick] [--samples 14197122] [--per-shard 1000] [--folder DIR]

The indexes are real, for empty (sparse) tars, with names like ImageNet's; every 50th index is the same, and no image is
read. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from dsmim.data.order import Order, rank_positions, training_order
from dsmim.data.reader import ShardReader
from dsmim.shards.index import fingerprint, write_sidecar
from dsmim.shards.opening import open_shards
from dsmim.shards.scan import Contents, Sample

IMAGE_BYTES = 110_000  # ImageNet's mean, from published figures (1.3 TB)
IMAGENET_22K = 14_197_122
CLASSES = 21_841
TEMPLATES = 50
BATCH, RANKS, WINDOW = 2048, 8, 16  # global batch of the published pre-training; one node; default of the recipes


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="order-scale-", dir=options.folder) as name:
        folder = Path(name)
        shards = make_indexes(folder, options.samples, options.per_shard)
        _report(f"{options.samples:,} samples in {shards:,} shards")
        figures = {"samples": options.samples, "per_shard": options.per_shard, **measure(folder, options)}
    print(json.dumps(figures))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return all figures; every start is measured in a new process."""
    steps = 500 if options.quick else 10_000
    bytes_per_sample = sum(file.stat().st_size for file in folder.glob("*.dsmi")) / options.samples
    startup = min(_in_process(start, folder, 0) for _ in range(3))
    resume = min(_in_process(start, folder, 137 * options.samples + 5_000_011) for _ in range(3))
    _report(f"start {startup:.2f} s, resume in epoch 137 {resume:.2f} s, {bytes_per_sample:.1f} bytes per sample")
    memory = _in_process(walk, folder, steps)
    _report(f"a worker's memory over {steps:,} steps of {BATCH}: {memory}")
    return {
        "startup_seconds": round(startup, 3),
        "resume_seconds": round(resume, 3),
        "bytes_per_sample": round(bytes_per_sample, 2),
        **memory,
        **_in_process(shuffle_quality, folder, 0),
    }


def start(folder: Path, position: int) -> float:
    """Return the seconds from the shards' pattern to the place of the sample at a position."""
    begin = time.perf_counter()
    shards, order = _opened(folder)
    fingerprint(shards)
    reader, draw = ShardReader(shards), order[position]
    reader.table(draw.shard).place(draw.row)
    return time.perf_counter() - begin


def walk(folder: Path, steps: int) -> dict[str, float]:
    """Return the extra memory (MB) of a forked data worker that looks up every sample of one rank, step by step.

    It is the increase since the worker's start of its private or its resident pages, the larger of the two.
    """
    shards, order = _opened(folder)
    order[0]  # done by the parent, so that all workers share it
    return _in_process_forked(_walk, shards, order, steps)


def shuffle_quality(folder: Path, epoch: int) -> dict[str, float]:
    """Return how far the order is from a uniform permutation, and how close together its reads are.

    neighbour_distance_of_uniform: mean distance in the order of two successive samples of a shard, divided by that of
    a uniform permutation (a third of the data set). classes_of_uniform: distinct classes among 2,048 successive
    samples, divided by those of 2,048 drawn at random, if every shard has random classes; …_sorted_shards: the same if
    the shards were written class by class. window_megabytes: size of the samples of a window, which a page cache must
    hold so that every byte is read from storage once.
    """
    shards, order = _opened(folder)
    labels = np.sort(np.random.default_rng(1).integers(0, CLASSES, order.samples))
    share = min(order.samples, 2_000_000)
    drawn = [order[position] for position in range(share)]
    samples = np.array([draw.sample for draw in drawn])
    place = np.full(order.samples, -1, np.int64)
    place[samples] = np.arange(share)
    both = (place[:-1] >= 0) & (place[1:] >= 0)
    uniform = _distinct(np.random.default_rng(2).choice(labels, (50, BATCH)))
    batches = samples[: share // BATCH * BATCH].reshape(-1, BATCH)
    forward = _forward_share(shards, drawn[:200_000])
    return {
        "neighbour_distance_of_uniform": float(np.abs(np.diff(place))[both].mean() / (order.samples / 3)),
        "classes_of_uniform": _distinct(np.random.default_rng(3).permutation(labels)[batches]) / uniform,
        "classes_of_uniform_sorted_shards": _distinct(labels[batches]) / uniform,
        "window_megabytes": float(np.mean([shard.tar_bytes for shard in shards]) * WINDOW / 1e6),
        "bytes_within_window": 1.0 if _stays_in_window(order, drawn[:200_000]) else 0.0,
        "reads_forward_in_shard": forward,
    }


def make_indexes(folder: Path, samples: int, per_shard: int) -> int:
    """Write sidecars as `dsmim shards index` does, and sparse files of the tars' sizes; return the number of shards."""
    whole, rest = divmod(samples, per_shard)
    templates = [_template(folder, number, per_shard) for number in range(min(whole, TEMPLATES))]
    for number in range(whole):
        _shard(folder, number, *templates[number % TEMPLATES])
    if rest:
        _shard(folder, whole, *_template(folder, whole, rest))
    return whole + bool(rest)


def _template(folder: Path, number: int, count: int) -> tuple[bytes, int]:
    """Return a sidecar of `count` samples, and the size of its tar."""
    generator = np.random.default_rng(number)
    sizes = generator.gamma(3.0, IMAGE_BYTES / 3, count).astype(np.int64) // 512 * 512 + 2048
    offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    labels, images = generator.integers(0, CLASSES, count).tolist(), generator.integers(0, 50_000, count).tolist()
    rows = zip(labels, images, offsets[:-1], sizes.tolist(), strict=True)
    samples = [
        Sample(f"n{10_000_000 + 77 * label:08d}_{image}_{row}", offset, size, label)
        for row, (label, image, offset, size) in enumerate(rows)
    ]
    sidecar = folder / "template.dsmi"
    write_sidecar("template", str(sidecar), Contents(samples), offsets[-1] + 1024, "0" * 64)
    data = sidecar.read_bytes()
    sidecar.unlink()
    return data, offsets[-1] + 1024


def _shard(folder: Path, number: int, sidecar: bytes, tar_bytes: int) -> None:
    tar = folder / f"train-{number:06d}.tar"
    with tar.open("wb") as file:
        file.truncate(tar_bytes)
    Path(f"{tar}.dsmi").write_bytes(sidecar)


def _opened(folder: Path):
    from dsmim.recipe import Recipe

    last = len(list(folder.glob("*.tar"))) - 1
    data = {"train": f"{folder}/train-{{000000..{last:06d}}}.tar", "shuffle_window": WINDOW}
    recipe = Recipe.model_validate(
        {
            "name": "scale",
            "task": {"name": "simmim"},
            "model": {"name": "swinv2_nano", "img_size": 192, "window_size": 6},
            "data": data,
            "batch": {"global_batch": BATCH},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": {"epochs": 1}},
        }
    )
    shards = open_shards(recipe.data.train)
    return shards, training_order(recipe, shards)


def _walk(shards: list, order: Order, steps: int) -> dict[str, float]:
    reader, me = ShardReader(shards, keep=2 * WINDOW), psutil.Process()
    before, readings = me.memory_full_info(), []
    for step in range(steps):
        for position in rank_positions(step * BATCH, BATCH, RANKS, rank=0):
            draw = order[position]
            table = reader.table(draw.shard)
            table.place(draw.row), table.keys[draw.row]
        if step % (steps // 10) == steps // 10 - 1:
            now = me.memory_full_info()
            readings.append(max(now.uss - before.uss, now.rss - before.rss) / 1e6)
    half = len(readings) // 2
    return {
        "worker_extra_mb": round(max(readings), 1),
        "worker_growth_mb": round(max(readings[half:]) - max(readings[:half]), 1),
    }


def _forward_share(shards: list, drawn: list) -> float:
    """Return the share of reads at a later offset than the previous read of the same shard."""
    rows, forward = {}, 0
    for draw in drawn:
        forward += rows.get(draw.shard, -1) < draw.row
        rows[draw.shard] = draw.row
    return forward / len(drawn)


def _stays_in_window(order: Order, drawn: list) -> bool:
    """Return whether every window reads only its own shards, and no window comes twice."""
    shards = {}
    for draw in drawn:
        shards.setdefault(draw.window, set()).add(draw.shard)
    return all(len(found) <= order.window for found in shards.values()) and [d.window for d in drawn] == sorted(
        d.window for d in drawn
    )


def _distinct(labels: np.ndarray) -> float:
    return float(np.mean([len(np.unique(batch)) for batch in labels]))


def _in_process(function, *arguments):
    """Return the function's result from a new interpreter, so that only the file system's cache is warm."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _in_process_forked(function, *arguments):
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: send.send(function(*arguments)))
    process.start()
    send.close()  # so that recv ends if the child dies
    result = receive.recv()
    process.join()
    return result


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute: fewer steps of the worker")
    parser.add_argument("--samples", type=int, default=IMAGENET_22K)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--folder", help="where the indexes are made (default: the temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Global batches, joined from the loaders of all ranks; run as a script, one rank of several.

    torchrun … loading.py SHARDS OUT WORKERS CONSUMED STEPS

writes OUT/RANK.json: per step, per sample, its key and a digest of its tensors.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from dsmim.data.dataset import TarDataset
from dsmim.data.loader import train_loader
from dsmim.data.masking import RandomMask
from dsmim.data.order import Order
from dsmim.data.reader import ShardReader
from dsmim.data.transforms import train_transform
from dsmim.recipe import Augment
from dsmim.shards.opening import open_shards

THREE = Augment(crop="simple", three_augment=True, color_jitter=0.3)
FULL = Augment(vflip=0.5, rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
BATCH = 12


class SampleTransform:
    """Makes a sample of every augmentation that draws random numbers, the label, and a mask."""

    def __init__(self, augment: Augment = FULL):
        self.transform = train_transform(augment, 24)

    def __call__(self, data: bytes, label: int | None) -> dict:
        return {"image": self.transform(data), "label": label or 0, "mask": RandomMask(24, 4, 4, 0.6)()}


def dataset(folder, classes=3, seed=5, window=2, transform=None, repeats=1, batch=BATCH) -> TarDataset:
    shards = open_shards(f"{folder}/train-*.tar", None, "data.train")
    order = Order([index.samples for index in shards], seed, window, repeats, batch)
    return TarDataset(ShardReader(shards), order, transform or SampleTransform(), classes)


def stream(folder, world, workers, consumed, steps, batch=BATCH, accumulation=1, **options) -> list[tuple]:
    """Return global batches as (keys, bytes of the tensors), joined from every rank's loader."""
    per_rank = [
        list(
            train_loader(
                dataset(folder, batch=batch, **options),
                consumed,
                steps,
                batch,
                accumulation,
                world,
                rank,
                workers,
                False,
            )
        )
        for rank in range(world)
    ]
    out = []
    for step in range(steps):
        micros = [m for rank in per_rank for m in rank[step * accumulation : (step + 1) * accumulation]]
        keys = [key for micro in micros for key in micro["key"]]
        out.append((keys, *(torch.cat([m[n] for m in micros]).numpy().tobytes() for n in ("image", "mask", "label"))))
    return out


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    workers, consumed, steps = (int(word) for word in sys.argv[3:])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loader = train_loader(dataset(folder), consumed, steps, BATCH, 1, world, rank, workers, pin=False)
    (out / f"{rank}.json").write_text(json.dumps([digests(batch) for batch in loader]))


def digests(batch: dict) -> list[str]:
    """Return per sample its key and the SHA-256 of its tensors."""
    rows = zip(batch["key"], batch["image"], batch["mask"], batch["label"], strict=True)
    return [
        f"{key} {hashlib.sha256(b''.join(t.numpy().tobytes() for t in tensors)).hexdigest()}" for key, *tensors in rows
    ]


if __name__ == "__main__":
    main()

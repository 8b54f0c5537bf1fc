"""The pipelines that loader.py times: dsmim's, the papers', WebDataset's and the decoder alone."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dsmim.data.dataset import TarDataset
from dsmim.data.loader import train_loader
from dsmim.data.order import Order, stream_key
from dsmim.data.reader import ShardReader
from dsmim.data.streams import own_stream, reseed
from dsmim.data.transforms import train_transform
from dsmim.packing.sources import read_sources
from dsmim.packing.writer import WriteOptions, build_shards
from dsmim.recipe import Recipe
from dsmim.shards.index import ShardIndex
from dsmim.shards.opening import index_all, open_shards
from dsmim.tasks import build_task

BATCH = 32
SEED = 0
PER_SHARD = 64
SHUFFLE_WINDOW = 16  # shards; here all of them
WORKER_BATCHES = 20  # timed per round; an even number, so that each of two workers makes half
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as both papers' code has them
MASK_PATCH, MODEL_PATCH, MASK_RATIO = 32, 4, 0.6  # microsoft/SimMIM, simmim_pretrain__swin_base__img192_window6

Rate = Callable[[], float]
"""Runs a pipeline once over the images and returns samples per second."""


@dataclass(frozen=True)
class Crop:
    """The random resized crop of one paper, and the recipe with which dsmim makes it."""

    prefix: str
    """Prefix of the names of its figures."""
    size: int
    scale: tuple[float, float]
    interpolation: str
    task: dict
    window: int

    def recipe(self, hflip: float = 0.5) -> Recipe:
        augment = {"crop_scale": self.scale, "interpolation": self.interpolation, "hflip": hflip}
        return Recipe.model_validate(
            {
                "name": "benchmark",
                "seed": SEED,
                "task": self.task,
                "model": {"name": "swinv2_nano", "img_size": self.size, "window_size": self.window},
                "data": {"augment": augment, "shuffle_window": SHUFFLE_WINDOW},
                "batch": {"global_batch": BATCH},
                "optim": {"lr": 1e-3},
                "schedule": {"duration": {"steps": 1}},
            }
        )

    @property
    def mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)


# microsoft/SimMIM, data_simmim.py
SIMMIM = Crop("", 192, (0.67, 1.0), "bilinear", {"name": "simmim", "mask_ratio": MASK_RATIO}, 12)
# facebookresearch/deit, augment.py: RandomResizedCropAndInterpolation, bicubic; without its colour transforms
DEIT3 = Crop("deit3_", 224, (0.08, 1.0), "bicubic", {"name": "classify", "num_classes": 10}, 7)


@dataclass(frozen=True)
class Shards:
    """Tars of all photographs, and the order in which dsmim reads them."""

    folder: Path

    @cached_property
    def indexes(self) -> list[ShardIndex]:
        return open_shards(str(self.folder))

    @cached_property
    def order(self) -> Order:
        return Order([index.samples for index in self.indexes], SEED, SHUFFLE_WINDOW)

    def dataset(self, crop: Crop, hflip: float = 0.5) -> TarDataset:
        """Return dsmim's training samples of the crop's task."""
        task = build_task(crop.recipe(hflip))
        return TarDataset(ShardReader(self.indexes), self.order, task.train_sample, task.classes)

    def images(self) -> list[bytes]:
        """Return the JPEGs of the first epoch, by position."""
        reader = ShardReader(self.indexes)
        draws = [self.order[position] for position in range(self.order.samples)]
        return [bytes(reader.read(draw.shard, draw.row)[1]["jpg"]) for draw in draws]

    def boxes(self, crop: Crop, images: list[bytes]) -> list[dict]:
        """Return the crops that dsmim draws for those images; a crop is drawn first from a sample's stream."""
        cropping = train_transform(crop.recipe().data.augment, crop.size).steps[0]
        boxes = []
        for position, data in enumerate(images):
            width, height = Image.open(io.BytesIO(data)).size
            draw = self.order[position]
            with own_stream():
                reseed(stream_key(SEED, "sample", draw.epoch, draw.sample, draw.repeat))
                boxes.append(dict(zip(("top", "left", "height", "width"), cropping.box(height, width), strict=True)))
        return boxes


def make_shards(photos: Path, name: str, short_side: int | None) -> Shards:
    """Build shards of the photographs, beside their folder; those of an earlier call are kept."""
    options = WriteOptions(per_shard=PER_SHARD, short_side=short_side)
    folder = photos.with_name(f"{photos.name}-{name}" + (f"-q{options.quality}" if short_side else ""))
    found = read_sources(str(photos))
    build_shards({"data": found.sources}, folder, found.classes, options)
    index_all([str(folder)], None, workers=1)  # the cache may be from a version with another index
    return Shards(folder)


class SimMIMMask:
    """A mask per image, drawn with NumPy on the grid of mask patches and enlarged to the model's patches."""

    def __init__(self, size: int):
        self.side = size // MASK_PATCH
        self.hidden = int(np.ceil(self.side**2 * MASK_RATIO))

    def __call__(self) -> np.ndarray:
        mask = (np.random.permutation(self.side**2) < self.hidden).astype(int).reshape(self.side, self.side)
        return mask.repeat(MASK_PATCH // MODEL_PATCH, axis=0).repeat(MASK_PATCH // MODEL_PATCH, axis=1)


class PapersSample:
    """A PIL image as the papers' public code prepares it: torchvision's first transforms, floats, and SimMIM's mask."""

    def __init__(self, crop: Crop):
        self.image = v1.Compose(
            [
                v1.Lambda(lambda image: image if image.mode == "RGB" else image.convert("RGB")),
                v1.RandomResizedCrop(crop.size, scale=crop.scale, interpolation=crop.mode),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                v1.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
            ]
        )
        self.mask = SimMIMMask(crop.size) if crop.task["name"] == "simmim" else None

    def __call__(self, image: Image.Image):
        return (self.image(image), self.mask()) if self.mask else self.image(image)


def timed(batches: Callable[[], Iterable], samples: int) -> Rate:
    """Return the rate of a pipeline that ends after `samples` samples."""

    def rate() -> float:
        begin = time.perf_counter()
        for _ in batches():
            pass
        return samples / (time.perf_counter() - begin)

    return rate


def papers(photos: Path, crop: Crop, samples: int) -> Rate:
    """Return the papers' pipeline: ImageFolder, Pillow, torchvision's first transforms, default collation."""
    dataset = ImageFolder(photos, PapersSample(crop))
    return timed(lambda: DataLoader(dataset, BATCH, shuffle=True), samples)


def ours(shards: Shards, crop: Crop, samples: int) -> Rate:
    """Return dsmim's loader, without worker processes."""
    dataset = shards.dataset(crop)
    return timed(lambda: train_loader(dataset, 0, samples // BATCH, BATCH, 1, 1, 0, 0, False), samples)


def ours_with_workers(shards: Shards, crop: Crop, workers: int) -> Rate:
    """Return dsmim's loader with worker processes, timed after their queues have been emptied: its steady rate."""
    dataset = shards.dataset(crop)

    def rate() -> float:
        loader = train_loader(dataset, 0, WORKER_BATCHES + 4 * workers, BATCH, 1, 1, 0, workers, False)
        batches = iter(loader)
        for _ in islice(batches, 2 * workers):
            pass
        begin = time.perf_counter()
        for _ in islice(batches, WORKER_BATCHES):
            pass
        return WORKER_BATCHES * BATCH / (time.perf_counter() - begin)

    return rate


def decode_bound(shards: Shards, crop: Crop) -> Rate:
    """Return only decoder, crop and resize, on bytes in memory and with the boxes that dsmim draws."""
    images = shards.images()
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
    pairs = list(zip(tensors, shards.boxes(crop, images), strict=True))

    def work() -> Iterable:
        for data, box in pairs:
            image = decode_image(data, ImageReadMode.RGB)
            yield TF.resized_crop(image, **box, size=[crop.size] * 2, interpolation=crop.mode, antialias=True)

    return timed(work, len(pairs))


def webdataset_pipeline(shards: Shards, crop: Crop, samples: int) -> Rate:
    """Return WebDataset's own pipeline over the same tars."""
    tars = [str(index.tar) for index in shards.indexes]
    sample = PapersSample(crop)

    def batches() -> Iterable:
        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(samples).decode("pil")
        return dataset.to_tuple("jpg", "cls").map_tuple(sample).batched(BATCH, collation_fn=default_collate)

    return timed(batches, samples)

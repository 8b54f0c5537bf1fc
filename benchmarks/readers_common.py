"""What the readers of readers.py share: the tars, the pixels of a sample, the layouts, and what a reader must offer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from photos import make_photos
from PIL import Image

from dsmim.data.crop import RandomResizedCrop
from dsmim.packing.sources import read_sources
from dsmim.packing.writer import WriteOptions, build_shards
from dsmim.recipe import Augment
from dsmim.shards.index import ShardIndex
from dsmim.shards.opening import open_shards

GLOBAL_BATCH = 32
SIZE = 192  # pixels, and the crop below: microsoft/SimMIM, data_simmim.py
TARS = 16  # a multiple of ranks × workers in every layout, so that each reader can share them evenly
SEED = 0
BUFFER = 32  # samples of the shuffle buffer of the readers that have one
SOURCES, SOURCE_SIZE = 6, (1500, 1125)  # pictures that the photographs are cut from

Step = list[tuple[str, str]]
"""Key and digest of the pixels of every sample of a step, sorted."""


@dataclass(frozen=True)
class Layout:
    """How many ranks and workers per rank read, and how many samples make a micro batch."""

    ranks: int
    workers: int
    micro: int

    def __str__(self) -> str:
        return f"{self.ranks}x{self.workers}"

    @property
    def micro_batches(self) -> int:
        """Micro batches of one rank in one step."""
        return GLOBAL_BATCH // (self.micro * self.ranks)


class Unsupported(Exception):
    """The reader refuses this; the message is its own or says where its docs say so."""


class Stream(Protocol):
    """One rank's batches, endlessly."""

    def step(self) -> list[tuple[list[str], torch.Tensor | np.ndarray]]:
        """Return the micro batches of one step: keys, and uint8 pixels (B, H, W, C)."""

    def state(self) -> Any:
        """Return what a later stream has to be given to continue after the last step; it can be pickled."""

    def close(self) -> None:
        """End the workers."""


class Reader(Protocol):
    """A library that reads tars."""

    packages: tuple[str, ...]
    """Names on PyPI."""

    def open(self, tars: Tars, layout: Layout, rank: int, state: Any = None) -> Stream:
        """Open one rank's stream, at the beginning or where `state` was saved."""

    def convert(self, states: list[Any], layout: Layout) -> list[Any]:
        """Return the states for the ranks of another layout. Raises Unsupported."""

    def stored(self, states: list[Any]) -> list[Any]:
        """Return what of the ranks' states a checkpoint has to hold."""


def missing(packages: tuple[str, ...]) -> list[str]:
    """Return the packages that are not installed."""

    def absent(package: str) -> bool:
        try:
            version(package)
        except PackageNotFoundError:
            return True
        return False

    return [package for package in packages if absent(package)]


@dataclass(frozen=True)
class Tars:
    """The tars that all readers read. Beside them are dsmim's indexes; the tars themselves are plain WebDataset."""

    folder: Path

    @cached_property
    def indexes(self) -> list[ShardIndex]:
        return open_shards(str(self.folder))

    @property
    def paths(self) -> list[str]:
        return sorted(str(path) for path in self.folder.glob("*.tar"))


def make_tars(cache: Path, samples: int) -> Tars:
    """Write tars of `samples` photographs to `cache`, unless a former call did; nothing is downloaded."""
    sources = cache / "readers-sources"
    if not (sources / "made").exists():
        sources.mkdir(parents=True, exist_ok=True)
        for number in range(SOURCES):
            _picture(np.random.default_rng(number)).save(sources / f"{number:02d}.jpg", quality=95)
        (sources / "made").touch()
    photos = make_photos(cache / f"readers-photos-{samples}", samples, sources, cache)
    found = read_sources(str(photos))
    folder = cache / f"readers-tars-{samples}"
    build_shards({"data": found.sources}, folder, found.classes, WriteOptions(per_shard=samples // TARS))
    return Tars(folder)


def _picture(generator: np.random.Generator) -> Image.Image:
    """Return noise whose amplitude falls with 1 / frequency, as that of natural images does (Field, 1987)."""
    width, height = SOURCE_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # (H, W / 2 + 1)
    frequency[0, 0] = np.inf
    noise = generator.standard_normal((4, height, width), dtype=np.float32)
    planes = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    colours = planes[:1] + 0.3 * planes[1:]  # colours of natural images go largely together
    return Image.fromarray(np.clip(128 + 45 * colours, 0, 255).astype(np.uint8).transpose(1, 2, 0))


_CROP = RandomResizedCrop(Augment(crop_scale=(0.67, 1.0), interpolation="bilinear"), SIZE)


def pixels(data: bytes | memoryview) -> torch.Tensor:
    """Decode, crop at random, resize and flip half of the images: (H, W, C) uint8, contiguous. Draws from Python's
    `random`, so what seeds that decides the pixels. The same function serves every reader."""
    image = _CROP(data)  # (C, H, W), channels-last in memory
    if random.random() < 0.5:
        image = image.flip(-1)
    return image.permute(1, 2, 0).contiguous()


def fingerprint(keys: list[str], images: torch.Tensor | np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield key and digest of every sample of a batch."""
    for key, image in zip(keys, np.asarray(images), strict=True):
        yield key, hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest()

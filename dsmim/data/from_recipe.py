"""What a recipe's section `data` describes: its training and validation shards, opened, and a reader of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsmim.data.decode import decoder_name
from dsmim.data.reader import ShardReader
from dsmim.recipe import Data, required
from dsmim.recipe.errors import nearest
from dsmim.shards.cache import ShardCache
from dsmim.shards.classes import CLASSES, read_names
from dsmim.shards.index import ShardIndex, fingerprint
from dsmim.shards.opening import open_shards
from dsmim.shards.remote import is_remote

GB = 10**9


def training_shards(data: Data) -> list[ShardIndex]:
    """Open the indexes of data.train, reduced to data.subset and data.classes if they are given.

    Raises ValueError when an index is missing, or no sample has one of the classes.
    """
    patterns = required(data.train, "data.train")
    shards = open_shards(patterns, data.index_dir, "data.train", data.subset, data.allow_pipe)
    if data.classes is None:
        return shards
    numbers = _class_numbers(data.classes, shards)
    chosen = [shard.with_classes(numbers) for shard in shards]
    seen = {int(label) for shard in chosen for label in np.unique(shard.labels())}
    if absent := [number for place, number in enumerate(numbers) if place not in seen]:
        raise ValueError(f"data.classes: no sample of data.train has the class {', '.join(map(str, absent[:5]))}")
    return chosen


def validation_shards(data: Data) -> list[ShardIndex]:
    """Open the indexes of data.val, reduced to data.classes if they are given. Raises ValueError when one is missing,
    or no sample has one of the classes."""
    patterns = required(data.val, "data.val")
    shards = open_shards(patterns, data.index_dir, "data.val", allow_pipe=data.allow_pipe)
    if data.classes is None:
        return shards
    numbers = _class_numbers(data.classes, shards)
    chosen = [shard.with_classes(numbers) for shard in shards]
    if not any(shard.samples for shard in chosen):
        raise ValueError(f"data.classes: no sample of data.val has one of the classes {numbers[:5]}")
    return chosen


def identity(data: Data, shards: list[ShardIndex]) -> dict[str, str]:
    """Return what decides a run's pixels and their order besides its recipe.

    state.json holds it, and a resume compares it: see IDENTITY in checkpoint/run_directory.py.
    """
    repeats = {"repeats_order": "apart"} if data.repeats > 1 else {}
    return {"data_fingerprint": fingerprint(shards), "decoder": decoder_name(), **repeats}


def open_reader(data: Data, shards: list[ShardIndex], window: int) -> ShardReader:
    """Return a reader of shards of which `window` are read at a time.

    Raises ValueError when remote shards have no cache, or a cache that cannot hold this window and the next: it would
    download every shard again and again.
    """
    if not any(is_remote(shard.tar) for shard in shards):
        return ShardReader(shards, None, 2 * window, data.image_key, data.max_pixels)
    folder = required(data.cache_dir, "data.cache_dir")
    needed = sum(sorted(shard.tar_bytes for shard in shards)[-2 * window :])
    if needed > data.cache_gb * GB:
        raise ValueError(
            f"data.cache_gb: {data.cache_gb:g} is less than the {needed / GB:.3g} GB of two windows of {window} "
            "shards; make it larger, or data.shuffle_window smaller"
        )
    return ShardReader(
        shards, ShardCache(Path(folder), int(data.cache_gb * GB)), 2 * window, data.image_key, data.max_pixels
    )


def class_items(classes: str | list[int | str]) -> list[int | str]:
    """Return the names and numbers that data.classes lists, itself or in a file."""
    return list(read_names(Path(classes))) if isinstance(classes, str) else classes


def _class_numbers(classes: str | list[int | str], shards: list[ShardIndex]) -> tuple[int, ...]:
    """Return the class numbers that data.classes means. Raises ValueError for unknown names and for repetitions."""
    items = class_items(classes)
    names = [item for item in items if not str(item).isdigit()]
    known = _names_beside(shards, names[0]) if names else {}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"data.classes: {unknown[0]!r} is no class of {CLASSES}{nearest(str(unknown[0]), [*known])}")
    numbers = [known[item] if item in known else int(item) for item in items]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError("data.classes: should list at least one class, and each once")
    return tuple(numbers)


def _names_beside(shards: list[ShardIndex], name: str | int) -> dict[str, int]:
    file = Path(shards[0].file).parent / CLASSES
    if not file.is_file():
        raise ValueError(f"data.classes: {name!r} is no number from 0, and there is no {file} that lists names")
    return {known: number for number, known in enumerate(read_names(file))}

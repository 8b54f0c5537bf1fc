"""What a recipe's section `data` describes: its training and validation shards, opened, and a reader of them."""

from __future__ import annotations

from pathlib import Path

from dsmim.data.decode import decoder_name
from dsmim.data.reader import ShardReader
from dsmim.recipe import Data, required
from dsmim.shards.cache import ShardCache
from dsmim.shards.index import ShardIndex, fingerprint
from dsmim.shards.opening import open_shards
from dsmim.shards.remote import is_remote

GB = 10**9


def training_shards(data: Data) -> list[ShardIndex]:
    """Open the indexes of data.train, reduced to data.subset if it is given. Raises ValueError when one is missing."""
    patterns = required(data.train, "data.train")
    return open_shards(patterns, data.index_dir, "data.train", data.subset, data.allow_pipe)


def validation_shards(data: Data) -> list[ShardIndex]:
    """Open the indexes of data.val. Raises ValueError when one is missing."""
    return open_shards(required(data.val, "data.val"), data.index_dir, "data.val", allow_pipe=data.allow_pipe)


def identity(shards: list[ShardIndex]) -> dict[str, str]:
    """Return what decides a run's pixels besides its recipe.

    state.json holds it, and a resume compares it: see IDENTITY in checkpoint/run_directory.py.
    """
    return {"data_fingerprint": fingerprint(shards), "decoder": decoder_name()}


def open_reader(data: Data, shards: list[ShardIndex], window: int) -> ShardReader:
    """Return a reader of shards of which `window` are read at a time.

    Raises ValueError when remote shards have no cache, or a cache that cannot hold this window and the next: it would
    download every shard again and again.
    """
    if not any(is_remote(shard.tar) for shard in shards):
        return ShardReader(shards, keep=2 * window)
    folder = required(data.cache_dir, "data.cache_dir")
    needed = sum(sorted(shard.tar_bytes for shard in shards)[-2 * window :])
    if needed > data.cache_gb * GB:
        raise ValueError(
            f"data.cache_gb: {data.cache_gb:g} is less than the {needed / GB:.3g} GB of two windows of {window} "
            "shards; make it larger, or data.shuffle_window smaller"
        )
    return ShardReader(shards, ShardCache(Path(folder), int(data.cache_gb * GB)), keep=2 * window)

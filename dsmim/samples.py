"""Which sample keys a step sees: to find a bad sample, and to prove the order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsmim.data.dataset import ShardReader
from dsmim.data.order import rank_positions, training_order
from dsmim.data.shards import open_shards
from dsmim.recipe import Recipe, required


def sample_keys(recipe: Recipe, steps: range, world_size: int, rank: int | None) -> Iterator[tuple[str, Path]]:
    """(key, shard) of every sample, in order, that steps of an unforked run of the recipe see.

    rank None: the whole global batch; else the share of that rank. Raises ValueError for a rank outside the world and
    for a global batch that the ranks cannot share.
    """
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank} is outside a world of {world_size}")
    shards = open_shards(required(recipe.data.train, "data.train"), recipe.data.index_dir, "data.train")
    order, reader = training_order(recipe, shards), ShardReader(shards)
    batch = recipe.batch.global_batch
    shares = range(world_size) if rank is None else [rank]
    for step in steps:
        for share in shares:
            for position in rank_positions(step * batch, batch, world_size, share):
                draw = order[position]
                yield reader.read(draw.shard, draw.row)[0], shards[draw.shard].tar

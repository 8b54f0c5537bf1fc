"""The sample keys that a step sees: to find a bad sample, and to check the order of samples."""

from __future__ import annotations

from collections.abc import Iterator

from dsmim.data.from_recipe import training_shards
from dsmim.data.order import rank_positions, training_order
from dsmim.data.reader import ShardReader
from dsmim.recipe import Recipe


def sample_keys(recipe: Recipe, steps: range, world_size: int, rank: int | None) -> Iterator[tuple[str, str]]:
    """Yield (key, shard) of every sample that the steps see, in order, for a run of the recipe that was never forked.

    rank: only the share of this rank; None: the whole global batch. Raises ValueError for a rank outside the world, and
    for a global batch that the ranks cannot share.
    """
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank} is outside a world of {world_size}: give 0 to {world_size - 1}")
    shards = training_shards(recipe.data)
    order, reader = training_order(recipe, shards), ShardReader(shards, keep=2 * recipe.data.shuffle_window)
    batch = recipe.batch.global_batch
    shares = range(world_size) if rank is None else [rank]
    for step in steps:
        for share in shares:
            for position in rank_positions(step * batch, batch, world_size, share):
                draw = order[position]
                yield reader.table(draw.shard).keys[draw.row], shards[draw.shard].tar

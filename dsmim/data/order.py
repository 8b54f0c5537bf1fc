"""Which sample comes when: a pure function of (seed, epoch, position), without state.

A position counts samples from the beginning of training, across epochs. In every epoch the shards are permuted and
divided into windows of a few shards, and the samples of a window are permuted. So few files are read at a time, and
the state of the data is one integer at any world size and any number of workers.

Permutations are argsorts of Philox words: NumPy guarantees those bits across versions, but not Generator's methods.

Repeated augmentation (arXiv 1901.09335) begins with the list in which every sample stands `repeats` times in a row. As
in RASampler of facebookresearch/deit (timm: RepeatAugSampler), a global batch is the next stretch of that list, and
ranks get different samples: there, rank r takes every entry whose number is r modulo the ranks. Here the entries whose
number in the global batch is 0 modulo the repeats come first, then those with 1, and so on. This depends on no number
of ranks, neighbours are different samples, and with at least as many ranks as repeats each copy is on another rank.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsmim.recipe import Recipe
from dsmim.shards.index import ShardIndex


@dataclass(frozen=True)
class Draw:
    """The sample at one position."""

    epoch: int
    """Pass over the data set, from 0. With repeats its length is that of so many epochs; see Order."""
    shard: int
    """Index into the list of shards."""
    row: int
    """Sample within the shard."""
    sample: int
    """Sample within the data set, counted in the order of the shards."""
    repeat: int
    """Number of the sample's repetition within the pass, from 0 (repeated augmentation)."""
    window: int
    """Window within the pass."""


def stream_key(*parts: int | str) -> int:
    """Return the seed of a random stream: 64 bits that depend on every part."""
    text = "/".join(map(str, parts)).encode("utf-8", "surrogateescape")  # file names, and so keys, may be any bytes
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of range(n), (n,), that depends on `key` alone."""
    words = np.random.Philox(key=stream_key(*key)).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """The order of samples over shards of the given sample counts.

    window: number of shards whose samples are mixed; repeats: how often each sample comes in a pass over all;
    global_batch: positions of a step, in which the repeats of a sample lie apart (1 leaves them in a row). Without
    repeats it changes nothing. Raises ValueError when the shards have no samples.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int, repeats: int = 1, global_batch: int = 1):
        assert len(counts) and window >= 1 and repeats >= 1 and global_batch >= 1
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.seed, self.window, self.repeats, self.global_batch = seed, window, repeats, global_batch
        self.samples = int(self.starts[-1])
        if not self.samples:
            raise ValueError("data: the shards contain no samples")
        self._epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._mixed = lru_cache(maxsize=4)(self._permute_window)

    @property
    def epoch_samples(self) -> int:
        """Positions per epoch, as schedules count it: as many as there are samples, also with repeats, as in timm. With
        repeats an epoch shows 1/repeats of the samples; so many epochs are a pass over all."""
        return self.samples

    @property
    def pass_samples(self) -> int:
        """Positions in which every sample comes `repeats` times."""
        return self.samples * self.repeats

    def __getitem__(self, position: int) -> Draw:
        epoch, rest = divmod(self._entry(position), self.pass_samples)
        place, repeat = divmod(rest, self.repeats)
        _, begins = self._epoch(epoch)
        number = bisect_right(begins, place) - 1
        shards, rows = self._mixed(epoch, number)
        shard, row = shards.item(place - begins[number]), rows.item(place - begins[number])
        return Draw(epoch, shard, row, self.starts.item(shard) + row, repeat, number)

    def draw_at(self, sample: int, like: Draw) -> Draw:
        """Return the draw of another sample (its number in the data set, modulo their count) in the place of `like`."""
        sample %= self.samples
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return Draw(like.epoch, shard, sample - int(self.starts[shard]), sample, like.repeat, like.window)

    def upcoming(self, position: int) -> list[int]:
        """Return the shards of the window at a position, then those of the next window, which may be in the next
        epoch."""
        draw = self[position]
        shards, begins = self._epoch(draw.epoch)
        if draw.window + 1 < len(begins):
            return shards[draw.window * self.window : (draw.window + 2) * self.window].tolist()
        following = self._epoch(draw.epoch + 1)[0][: self.window]
        return [*shards[draw.window * self.window :].tolist(), *following.tolist()]

    def _entry(self, position: int) -> int:
        """Return which entry of the list with every sample `repeats` times in a row comes at a position.

        A global batch of G positions has the same G entries; first every repeats-th from the first on, then every
        repeats-th from the second on, and so on. The first G mod repeats of these turns have one entry more.
        """
        if self.repeats == 1:
            return position
        begin, place = position - position % self.global_batch, position % self.global_batch
        length, longer = divmod(self.global_batch, self.repeats)
        if place < longer * (length + 1):
            turn, nth = divmod(place, length + 1)
        else:
            turn, nth = divmod(place - longer, length)
        return begin + nth * self.repeats + turn

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Return the epoch's sequence of shards, and the place at which each window begins."""
        shards = permutation(len(self.counts), self.seed, "shards", epoch)
        ends = np.cumsum(self.counts[shards])
        return shards, [0, *ends[self.window - 1 : -1 : self.window].tolist()]

    def _permute_window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the row of every place of a window."""
        shards = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
        owners = np.repeat(shards, self.counts[shards])
        rows = np.concatenate([np.arange(self.counts[shard]) for shard in shards])
        mixed = permutation(len(rows), self.seed, "window", epoch, number)
        return owners[mixed], rows[mixed]


def training_order(recipe: Recipe, shards: list[ShardIndex]) -> Order:
    """Return the order in which a recipe reads the samples of its training shards."""
    counts = [index.samples for index in shards]
    data = recipe.data
    return Order(counts, recipe.seed, data.shuffle_window, data.repeats, recipe.batch.global_batch)


def rank_positions(begin: int, global_batch: int, world_size: int, rank: int) -> range:
    """Return a rank's positions in the global batch that begins at position `begin`: a contiguous slice.

    Raises ValueError when the ranks cannot share the batch evenly.
    """
    if global_batch % world_size:
        raise ValueError(f"batch.global_batch: {global_batch} cannot be shared evenly by {world_size} ranks")
    share = global_batch // world_size
    first = begin + rank * share
    return range(first, first + share)


def accumulation_steps(global_batch: int, micro_batch: int | str, world_size: int) -> int:
    """Return the number of micro batches per rank and step; "auto": one.

    Raises ValueError, with the numbers, when ranks × micro batch does not divide the global batch.
    """
    micro = max(1, global_batch // world_size) if micro_batch == "auto" else micro_batch
    if global_batch % (world_size * micro):
        raise ValueError(
            f"batch.global_batch: {global_batch} is not a multiple of {world_size} ranks × micro batch {micro} "
            f"= {world_size * micro}; change batch.global_batch, batch.micro_batch or the number of ranks"
        )
    return global_batch // (world_size * micro)


def refit_accumulation(global_batch: int, micro_batch: int, world_size: int, accepts: Callable[[int], bool]) -> int:
    """Return the number of micro batches per rank and step of a run that resumes on `world_size` ranks.

    Their size is the largest up to `micro_batch` that divides a rank's share and for which `accepts` returns true.

    Raises ValueError, with the numbers, when ranks cannot share the global batch.
    """
    if global_batch % world_size:
        fits = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        near = [*[n for n in fits if n < world_size][-1:], *[n for n in fits if n > world_size][:1]]
        raise ValueError(
            f"batch.global_batch: {global_batch} cannot be shared evenly by {world_size} ranks, and it must stay as "
            f"it was; resume on {' or '.join(map(str, near))} ranks"
        )
    return limited_accumulation(global_batch, micro_batch, world_size, accepts)


def limited_accumulation(global_batch: int, largest: int, world_size: int, accepts: Callable[[int], bool]) -> int:
    """Return the number of micro batches per rank and step, of the largest size up to `largest` that divides a rank's
    share and for which `accepts` returns true. Raises ValueError, with the numbers, when there is none."""
    accumulation_steps(global_batch, "auto", world_size)  # raises when ranks cannot share the batch
    share = global_batch // world_size
    for micro in range(min(share, largest), 0, -1):
        if share % micro == 0 and accepts(micro):
            return share // micro
    raise ValueError(f"batch.global_batch: no micro batch of 1 to {largest} fits a share of {share} samples per rank")

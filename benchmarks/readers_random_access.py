"""The readers that reach any sample by its position: dsmim, and Grain over a source of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from readers_common import GLOBAL_BATCH, SEED, TARS, Layout, Tars, pixels

from dsmim.data.dataset import TarDataset
from dsmim.data.loader import train_loader
from dsmim.data.order import Order
from dsmim.data.reader import ShardReader
from dsmim.data.streams import reseed

FOREVER = 10_000  # steps of a dsmim loader, more than any measurement takes


class Dsmim:
    """dsmim's own data set and loader, as the training loop opens them. The state is the number of samples consumed."""

    packages = ()

    def open(self, tars: Tars, layout: Layout, rank: int, state: int | None = None) -> DsmimStream:
        return DsmimStream(tars, layout, rank, state or 0)

    def convert(self, states: list[int], layout: Layout) -> list[int]:
        return [states[0]] * layout.ranks

    def stored(self, states: list[int]) -> list[int]:
        return states[:1]


class DsmimStream:
    def __init__(self, tars: Tars, layout: Layout, rank: int, consumed: int):
        order = Order([index.samples for index in tars.indexes], SEED, TARS)
        dataset = TarDataset(ShardReader(tars.indexes), order, _dsmim_sample, None)
        loader = train_loader(
            dataset, consumed, FOREVER, GLOBAL_BATCH, layout.micro_batches, layout.ranks, rank, layout.workers, False
        )
        self.batches, self.consumed, self.micro_batches = iter(loader), consumed, layout.micro_batches

    def step(self) -> list[tuple[list[str], torch.Tensor]]:
        batches = [next(self.batches) for _ in range(self.micro_batches)]
        self.consumed += GLOBAL_BATCH
        return [(batch["key"], batch["image"].permute(0, 2, 3, 1)) for batch in batches]

    def state(self) -> int:
        return self.consumed

    def close(self) -> None:
        del self.batches


def _dsmim_sample(data: memoryview, label: int | None) -> dict[str, Any]:
    return {"image": pixels(data).permute(2, 0, 1)}  # (C, H, W), channels-last, as dsmim's transforms give it


class Grain:
    """Grain's ElasticIterator over a MapDataset; its documentation: grain.experimental.ElasticIterator ("State of any
    shard can be used to restore the state of all of the shards after changes in sharding and global batch size").

    Grain ships sources for ArrayRecord, Bagz, Parquet and TFRecord, none for tars, so the source is ours, with dsmim's
    index. Shuffling and random numbers are Grain's own (MapDataset.shuffle, MapDataset.random_map).
    """

    packages = ("grain",)

    def open(self, tars: Tars, layout: Layout, rank: int, state: dict | None = None) -> GrainStream:
        return GrainStream(tars, layout, rank, state)

    def convert(self, states: list[dict], layout: Layout) -> list[dict]:
        return [states[0]] * layout.ranks

    def stored(self, states: list[dict]) -> list[dict]:
        return states[:1]


class TarSource:
    """Samples of tars by number: what Grain's RandomAccessDataSource asks for."""

    def __init__(self, tars: Tars):
        self.reader = ShardReader(tars.indexes)
        self.starts = np.cumsum([0, *(index.samples for index in tars.indexes)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        key, members = self.reader.read(shard, int(sample - self.starts[shard]))
        return {"key": key, "jpg": members["jpg"]}


class GrainStream:
    def __init__(self, tars: Tars, layout: Layout, rank: int, state: dict | None):
        import grain

        samples = grain.MapDataset.source(TarSource(tars)).seed(SEED).shuffle().repeat().random_map(_grain_sample)
        self.batches = grain.experimental.ElasticIterator(
            samples,
            GLOBAL_BATCH,
            grain.sharding.ShardOptions(shard_index=rank, shard_count=layout.ranks),
            # Threads read ahead for slow storage; here they would compete for the one core ("recommend setting this
            # to 0", grain.ReadOptions, on data that is in memory).
            read_options=grain.ReadOptions(num_threads=0, prefetch_buffer_size=0),
            multiprocessing_options=grain.MultiprocessingOptions(layout.workers) if layout.workers else None,
        )
        if state is not None:
            self.batches.set_state(state)

    def step(self) -> list[tuple[list[str], np.ndarray]]:
        batch = next(self.batches)
        return [([str(key) for key in batch["key"]], batch["image"])]

    def state(self) -> dict:
        return self.batches.get_state()

    def close(self) -> None:
        self.batches.close()


def _grain_sample(sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    reseed(int(generator.integers(2**63)))
    return {"key": sample["key"], "image": pixels(sample["jpg"]).numpy()}

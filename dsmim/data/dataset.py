"""A map-style data set over tar shards: a position of the order in, a dictionary of tensors out."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from dsmim.data.index import IMAGE_EXTENSIONS, ShardIndex, parse_sample
from dsmim.data.order import Draw, Order, stream_key
from dsmim.data.transforms import Undecodable, decode, seeded

OPEN_SHARDS = 64  # file descriptors a process keeps open
STAND_INS = 10  # neighbours tried in place of an undecodable image

# image (3, H, W) uint8 and label → the tensors of one sample; runs under the sample's own random streams
SampleTransform = Callable[[torch.Tensor, int | None], dict[str, Any]]


class ShardReader:
    """Samples by shard and row: one positioned read each, a few files open at a time."""

    def __init__(self, shards: list[ShardIndex]):
        self.shards = shards
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"shards": self.shards, "_files": OrderedDict()}  # descriptors do not travel between processes

    def read(self, shard: int, row: int) -> tuple[str, dict[str, bytes]]:
        """Key and members (extension → bytes). Raises ValueError when the shard is no longer what was indexed."""
        offset, length = (int(value) for value in self.shards[shard].records[row])
        data = os.pread(self._descriptor(shard), length, offset)
        if len(data) < length:
            raise ValueError(f"{self.shards[shard].tar}: has shrunk since training began")
        key, members = parse_sample(data)
        if not key:
            raise ValueError(f"{self.shards[shard].tar}: no sample at byte {offset}; index the shard again")
        return key, members

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard].tar, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]


class TarDataset(Dataset):
    """Training samples by position. An undecodable image is replaced by the next one of the data set that decodes, so
    that batches keep their shape; the sample then carries the fault in `undecodable`."""

    def __init__(self, shards: list[ShardIndex], order: Order, transform: SampleTransform, labelled: bool):
        self.reader, self.order, self.transform, self.labelled = ShardReader(shards), order, transform, labelled

    def __getitem__(self, position: int) -> dict[str, Any]:
        draw = self.order[position]
        faults: list[str] = []
        for attempt in range(STAND_INS):
            here = self.order.draw_at(draw.sample + attempt, draw)
            try:
                sample = self._sample(here)
            except Undecodable as fault:
                faults.append(str(fault))
                continue
            return sample | {"position": position, "undecodable": faults}
        raise ValueError(f"{STAND_INS} undecodable images in a row: {'; '.join(faults)}")

    def key(self, position: int) -> tuple[str, ShardIndex]:
        """Key of the sample at a position and the shard it lies in, without decoding it."""
        draw = self.order[position]
        return self.reader.read(draw.shard, draw.row)[0], self.reader.shards[draw.shard]

    def _sample(self, draw: Draw) -> dict[str, Any]:
        key, image, label = load(self.reader, draw.shard, draw.row, self.labelled)
        with seeded(stream_key(self.order.seed, "sample", draw.epoch, draw.sample, draw.repeat)):
            return {"key": key, **self.transform(image, label)}


class EvalDataset(Dataset):
    """Every sample once, in the order of the shards; its random streams depend on its key alone. An undecodable image
    counts nothing: it comes as zeros with weight 0, and its fault in `undecodable`."""

    def __init__(self, shards: list[ShardIndex], transform: SampleTransform, labelled: bool):
        self.reader, self.transform, self.labelled = ShardReader(shards), transform, labelled
        self.rows = [(shard, row) for shard, index in enumerate(shards) for row in range(index.samples)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, float]) -> dict[str, Any]:
        sample, weight = item
        shard, row = self.rows[sample]
        faults: list[str] = []
        try:
            key, image, label = load(self.reader, shard, row, self.labelled)
        except Undecodable as fault:
            key, image, label, weight = str(row), torch.zeros(3, 8, 8, dtype=torch.uint8), 0, 0.0
            faults.append(str(fault))
        with seeded(stream_key("evaluation", key)):
            tensors = self.transform(image, label)
        return {"key": key, **tensors, "weight": weight, "undecodable": faults}


def load(reader: ShardReader, shard: int, row: int, labelled: bool) -> tuple[str, torch.Tensor, int | None]:
    """(key, image, label) of one sample. Raises Undecodable for a bad image, ValueError for a missing label."""
    key, members = reader.read(shard, row)
    tar = reader.shards[shard].tar
    extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if extension is None:
        raise ValueError(f"{tar}: sample {key} has no image; index the shard again")
    label = _label(tar, key, members) if labelled else None
    try:
        return key, decode(members[extension]), label
    except Undecodable as error:
        raise Undecodable(f"{tar}: {key}.{extension} cannot be decoded: {error}") from None


def _label(tar, key: str, members: dict[str, bytes]) -> int:
    try:
        return int(members["cls"])
    except KeyError:
        raise ValueError(f"{tar}: sample {key} has no label ({key}.cls)") from None
    except ValueError:
        raise ValueError(f"{tar}: label {key}.cls is no whole number: {members['cls'][:20]!r}") from None


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers; keep keys as a list; join the faults."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if name == "undecodable":
            batch[name] = [fault for faults in values for fault in faults]
        elif isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, (int, float)):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch

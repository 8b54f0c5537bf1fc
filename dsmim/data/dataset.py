"""A map-style data set over tar shards: a position of the order in, a dictionary of tensors out."""

from __future__ import annotations

import os
import tarfile
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


class DataError(ValueError):
    """A shard that cannot be trained on. Raised in a data worker, it reaches the user without the traceback that
    torch's DataLoader wraps around it."""

    def __init__(self, message: str):
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


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
        """Key and members (extension → bytes). Raises DataError when the shard is no longer what was indexed."""
        offset, length = (int(value) for value in self.shards[shard].records[row])
        data = os.pread(self._descriptor(shard), length, offset)
        if len(data) < length:
            raise DataError(f"{self.shards[shard].tar}: has shrunk since training began")
        try:
            key, members = parse_sample(data)
        except tarfile.TarError:
            key = ""  # the bytes there are no tar member any more
        if not key:
            raise DataError(f"{self.shards[shard].tar}: no sample at byte {offset}; index the shard again")
        return key, members

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            tar = self.shards[shard].tar
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[shard] = os.open(tar, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{tar}: cannot be opened: {error.strerror}") from None
        self._files.move_to_end(shard)
        return self._files[shard]


class TarDataset(Dataset):
    """Training samples by position. An undecodable image is replaced by the next one of the data set that decodes, so
    that batches keep their shape; the sample then carries the fault in `undecodable`."""

    def __init__(self, shards: list[ShardIndex], order: Order, transform: SampleTransform, classes: int | None):
        self.reader, self.order, self.transform, self.classes = ShardReader(shards), order, transform, classes

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
        raise DataError(f"{STAND_INS} undecodable images in a row: {'; '.join(faults)}")

    def _sample(self, draw: Draw) -> dict[str, Any]:
        key, image, label = load(self.reader, draw.shard, draw.row, self.classes)
        with seeded(stream_key(self.order.seed, "sample", draw.epoch, draw.sample, draw.repeat)):
            return {"key": key, **self.transform(image, label)}


class EvalDataset(Dataset):
    """Every sample once, in the order of the shards; its random streams depend on its key alone. An undecodable image
    counts nothing: it comes as zeros with weight 0, and its fault in `undecodable`."""

    def __init__(self, shards: list[ShardIndex], transform: SampleTransform, classes: int | None):
        self.reader, self.transform, self.classes = ShardReader(shards), transform, classes
        self.rows = [(shard, row) for shard, index in enumerate(shards) for row in range(index.samples)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, float]) -> dict[str, Any]:
        sample, weight = item
        shard, row = self.rows[sample]
        faults: list[str] = []
        try:
            key, image, label = load(self.reader, shard, row, self.classes)
        except Undecodable as fault:
            faults = [str(fault)] if weight else []  # padding is not reported
            key, image, label, weight = str(row), torch.zeros(3, 8, 8, dtype=torch.uint8), 0, 0.0
        with seeded(stream_key("evaluation", key)):
            tensors = self.transform(image, label)
        return {"key": key, **tensors, "weight": weight, "undecodable": faults}


def load(reader: ShardReader, shard: int, row: int, classes: int | None) -> tuple[str, torch.Tensor, int | None]:
    """(key, image, label) of one sample. Raises Undecodable for a bad image, DataError for a missing label."""
    key, members = reader.read(shard, row)
    tar = reader.shards[shard].tar
    extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if extension is None:
        raise DataError(f"{tar}: sample {key} has no image; index the shard again")
    label = None if classes is None else _label(tar, key, members, classes)
    try:
        return key, decode(members[extension]), label
    except Undecodable as error:
        raise Undecodable(f"{tar}: {key}.{extension} cannot be decoded: {error}") from None


def _label(tar, key: str, members: dict[str, bytes], classes: int) -> int:
    try:
        label = int(members["cls"])
    except KeyError:
        raise DataError(f"{tar}: sample {key} has no label ({key}.cls)") from None
    except ValueError:
        raise DataError(f"{tar}: label {key}.cls is no whole number: {members['cls'][:20]!r}") from None
    if not 0 <= label < classes:
        raise DataError(f"{tar}: label {key}.cls is {label}; task.num_classes {classes} allows 0 to {classes - 1}")
    return label


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

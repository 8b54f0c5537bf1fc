"""Map-style data sets over tar shards: from a position of the order to a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torchvision.io import encode_png

from dsmim.data.decode import Buffer, Undecodable, pixel_limit
from dsmim.data.order import Draw, Order, stream_key
from dsmim.data.reader import DataError, ShardReader
from dsmim.data.streams import own_stream, reseed
from dsmim.shards.sample_format import NO_LABEL

ATTEMPTS = 10  # successive samples that are tried, the drawn one first, until one decodes
PREFETCH = 4  # shards that an evaluation announces: the one that it reads and those after it
_BLANK = encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8)).numpy().tobytes()

SampleTransform = Callable[[Buffer, int | None], dict[str, Any]]
"""From an encoded image and its label to the tensors of one sample. Runs with the sample's own random stream. Raises
Undecodable."""


class TarDataset(Dataset):
    """Training samples by position. An undecodable image is replaced by the next one of the data set that decodes, so
    that batches keep their shape; `undecodable` of the sample then lists the faults."""

    def __init__(self, reader: ShardReader, order: Order, transform: SampleTransform, classes: int | None):
        self.reader, self.order, self.transform, self.classes = reader, order, transform, classes
        self._window: tuple[int, int] | None = None

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Return the samples of a micro batch, as DataLoader requests them."""
        with own_stream(), pixel_limit(self.reader.max_pixels):
            return [self._sample(position) for position in positions]

    def _sample(self, position: int) -> dict[str, Any]:
        draw = self.order[position]
        self._prefetch(draw, position)
        faults: list[str] = []
        for attempt in range(ATTEMPTS):
            here = self.order.draw_at(draw.sample + attempt, draw) if attempt else draw
            key = stream_key(self.order.seed, "sample", here.epoch, here.sample, here.repeat)
            try:
                sample = load_sample(self.reader, here.shard, here.row, self.classes, self.transform, key)
            except Undecodable as fault:
                faults.append(str(fault))
                continue
            return sample | {"position": position, "undecodable": faults}
        raise DataError(f"{ATTEMPTS} undecodable images in a row: {'; '.join(faults)}")

    def _prefetch(self, draw: Draw, position: int) -> None:
        window = draw.epoch, draw.window
        if self._window is None or window > self._window:  # with repeats a batch may return to the window before
            self._window = window
            self.reader.prefetch(self.order.upcoming(position))


class EvalDataset(Dataset):
    """Every sample once, in the order of the shards; a sample's random stream depends on its key alone. An undecodable
    image does not count: it becomes a blank image with weight 0, and `undecodable` has the fault. `number` counts the
    samples from 0. classes: None when samples need no label."""

    def __init__(self, reader: ShardReader, transform: SampleTransform, classes: int | None):
        self.reader, self.transform, self.classes = reader, transform, classes
        self.max_pixels = reader.max_pixels
        self.ends = np.cumsum([index.samples for index in reader.shards])
        self._shard: int | None = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, item: tuple[int, float]) -> dict[str, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[tuple[int, float]]) -> list[dict[str, Any]]:
        """Return the samples of a batch of (sample number, weight), as DataLoader requests them."""
        with own_stream(), pixel_limit(self.max_pixels):
            return [self._sample(*item) for item in items]

    def name(self, sample: int) -> tuple[str, str]:
        """Return the shard's path and the key of a sample."""
        shard, row = self._place(sample)
        return self.reader.shards[shard].tar, self.reader.table(shard).keys[row]

    def _sample(self, sample: int, weight: float) -> dict[str, Any]:
        try:
            tensors = self._load(sample)
        except Undecodable as fault:
            blank = {"key": str(sample), **self.transform(_BLANK, None if self.classes is None else 0)}
            # padding is not reported
            tensors, weight, faults = blank, 0.0, [str(fault)] if weight else []
        else:
            faults = []
        return tensors | {"number": sample, "weight": weight, "undecodable": faults}

    def _load(self, sample: int) -> dict[str, Any]:
        shard, row = self._place(sample)
        if shard != self._shard:
            self._shard = shard
            self.reader.prefetch(range(shard, min(shard + PREFETCH, len(self.ends))))
        return load_sample(self.reader, shard, row, self.classes, self.transform, None)

    def _place(self, sample: int) -> tuple[int, int]:
        """Return a sample's shard and row."""
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        return shard, sample - int(self.ends[shard]) + self.reader.shards[shard].samples


def load_sample(
    reader: ShardReader, shard: int, row: int, classes: int | None, transform: SampleTransform, stream: int | None
) -> dict[str, Any]:
    """Return key and tensors of one sample. `stream` seeds the transform's random stream (None: the key does).

    Call it inside own_stream(). Raises Undecodable for a damaged image, and DataError for a missing label or a changed
    shard.
    """
    key, members = reader.read(shard, row)
    tar = reader.shards[shard].tar
    extension = reader.image_of(shard, members)
    if extension is None:
        raise DataError(f"{tar}: sample {key} has no image (it has {', '.join(members)}); see data.image_key")
    label = None if classes is None else _label(tar, key, reader.label(shard, row), members, classes)
    reseed(stream_key("evaluation", key) if stream is None else stream)
    try:
        return {"key": key, **transform(members[extension], label)}
    except Undecodable as error:
        raise Undecodable(f"{tar}: {key}.{extension} cannot be decoded: {error}") from None


def _label(tar: str, key: str, label: int, members: dict[str, memoryview], classes: int) -> int:
    """Check a label. A run has checked all of them before its first step (data/labels.py)."""
    if label == NO_LABEL and "cls" in members:
        raise DataError(f"{tar}: label {key}.cls is no integer: {bytes(members['cls'][:20])!r}")
    if label == NO_LABEL:
        raise DataError(f"{tar}: sample {key} has no label ({key}.cls)")
    if label >= classes:
        raise DataError(f"{tar}: label {key}.cls is {label}; task.num_classes {classes} allows 0 to {classes - 1}")
    return label


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers of samples, list their keys, and join their lists of faults."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if name == "undecodable":
            batch[name] = [fault for faults in values for fault in faults]
        elif isinstance(first, torch.Tensor):
            batch[name] = _stack(values)
        elif isinstance(first, (int, float)):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stack by torch's collation, which in a worker writes directly into shared memory. Images (3, H, W) are
    channels-last in memory, as decoders write them; the stack is too, so that whole images are copied at once."""
    if tensors[0].ndim != 3:
        return default_collate(tensors)
    return default_collate([tensor.permute(1, 2, 0) for tensor in tensors]).permute(0, 3, 1, 2)
